"""The real engine behind the real server: every call, one mixed batch, streams, cancellation, and its metrics."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from peftmux.cli.main import main
from peftmux.client import (
    AdapterState,
    AlreadyExists,
    AsyncClient,
    ChatMessage,
    Client,
    DeadlineExceeded,
    FailedPrecondition,
    FinishReason,
    InvalidArgument,
    NotFound,
    Residency,
)
from tests.serving.conftest import FIXTURES, Running

KINDS = {"lora": "lora", "lora_dora": "dora", "prefix": "prefix"}
PROMPT = "w1 w2 w3 w4 w5 w6"
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}


def test_the_model(client: Client):
    model = client.model()
    assert (model.architecture, model.dtype, model.device) == ("LlamaForCausalLM", "float32", "cpu")
    assert (model.vocabulary_size, model.context_length) == (96, 100_000)
    assert {"lora", "dora", "prefix"} <= set(model.adapter_kinds)


def test_tokenize_and_generate_agree(client: Client):
    tokens = client.tokenize(PROMPT)
    assert len(tokens.token_ids) == len(tokens.pieces) > 0
    by_text = client.generate(PROMPT, **GREEDY)
    assert by_text == client.generate(tokens.token_ids, **GREEDY)
    assert (by_text.finish_reason, len(by_text.token_ids)) == (FinishReason.LENGTH, 24)
    assert by_text.usage.prompt_tokens == len(tokens.token_ids)


def test_a_stream_is_the_call_in_pieces(client: Client):
    options: dict[str, Any] = {**GREEDY, "logprobs": 2, "prompt_logprobs": 1}
    whole = client.generate(PROMPT, **options)
    chunks = list(client.stream(PROMPT, **options))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert sum((chunk.token_ids for chunk in chunks), ()) == whole.token_ids
    assert [lp.token_id for chunk in chunks for lp in chunk.logprobs] == list(whole.token_ids)
    assert [len(lp.top) for lp in whole.logprobs] == [2] * 24
    assert len(chunks[0].prompt_logprobs) == len(whole.prompt_logprobs) == whole.usage.prompt_tokens
    assert whole.prompt_logprobs[0].logprob is None
    assert chunks[-1].finish_reason is whole.finish_reason
    assert chunks[-1].usage is not None


def test_adapters_of_three_kinds_live_their_lives(client: Client):
    for name, kind in KINDS.items():
        loaded = client.load_adapter(name, name)
        assert (loaded.state, loaded.kind, loaded.residency) == (AdapterState.READY, kind, Residency.DEVICE)
        assert loaded.tensors > 0
        assert loaded.revision
        assert client.get_adapter(name).revision == loaded.revision
        assert client.load_adapter(name, name).revision == loaded.revision
    assert {adapter.name for adapter in client.list_adapters()} == {"start", *KINDS}
    for name in KINDS:
        assert client.unload_adapter(name).state is AdapterState.UNLOADED
        with pytest.raises(NotFound):
            client.generate(PROMPT, adapter=name)


def test_one_batch_answers_each_as_alone(client: Client):
    """Base, three kinds and the adapter of the command line, all at once, several times each."""
    for name in KINDS:
        client.load_adapter(name, name)
    names = ["", "start", *KINDS]
    alone = {name: client.generate(PROMPT, adapter=name, **GREEDY) for name in names}
    assert len({answer.text for answer in alone.values()}) == len(names)
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(lambda name: (name, client.generate(PROMPT, adapter=name, **GREEDY)), names * 4))
    for name, answer in together:
        assert answer.token_ids == alone[name].token_ids
        assert answer.adapter_revision == alone[name].adapter_revision


def test_an_adapter_loads_while_a_stream_runs(client: Client):
    stream = client.stream(PROMPT, temperature=0.0, ignore_eos=True, max_tokens=400)
    first = next(stream)
    client.load_adapter("lora", "lora")
    answer = client.generate(PROMPT, adapter="lora", **GREEDY)
    rest = list(stream)
    assert len(answer.token_ids) == 24
    assert len(first.token_ids) + sum(len(chunk.token_ids) for chunk in rest) == 400


def test_what_is_wrong_with_an_adapter_is_said(client: Client):
    for source in ("/etc", "../peft/llama/lora", "s3://bucket/x"):
        with pytest.raises(InvalidArgument) as refused:
            client.load_adapter("bad", source)
        assert refused.value.violations[0][0] == "source"
    with pytest.raises(NotFound):
        client.load_adapter("bad", "no-such-folder")
    with pytest.raises(FailedPrecondition, match="MISS") as unserved:
        client.load_adapter("bad", "miss")
    assert unserved.value.reason
    client.load_adapter("lora", "lora")
    with pytest.raises(AlreadyExists):
        client.load_adapter("lora", "lora_rslora")
    assert {adapter.name for adapter in client.list_adapters()} == {"start", "lora"}


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ([5, 96], {}, "token_ids.ids"),
        ("", {}, "text"),
        (PROMPT, {"max_tokens": 100_000}, "stopping.max_tokens"),
        ([5] * 100_000, {}, "token_ids"),
        (PROMPT, {"top_p": 0.0}, "sampling.top_p"),
        (PROMPT, {"logit_bias": {96: 1.0}}, "sampling.logit_bias"),
        (PROMPT, {"adapter": "a b"}, "adapter"),
        (PROMPT, {"adapter": "start", "adapter_task": 1}, "adapter_task"),
        ([ChatMessage("user", "hi")], {}, "chat"),
    ],
)
def test_a_bad_request_is_refused_and_the_server_goes_on(client: Client, prompt, options, field):
    with pytest.raises(InvalidArgument) as caught:
        client.generate(prompt, **options)
    assert [name for name, _ in caught.value.violations] == [field]
    assert "expected" in caught.value.message
    assert client.generate(PROMPT, **GREEDY).token_ids


def test_cancelled_streams_leave_nothing_behind(server: Running, client: Client):
    before = client.generate(PROMPT, adapter="start", **GREEDY)
    streams = [client.stream(PROMPT, adapter="start", ignore_eos=True) for _ in range(8)]
    for stream in streams:
        next(stream)
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]
    server.settle(peftmux_requests_running=0, peftmux_requests_waiting=0, peftmux_kv_cache_usage_ratio=0)
    assert client.get_adapter("start").requests_in_flight == 0
    assert client.generate(PROMPT, adapter="start", **GREEDY).token_ids == before.token_ids


def test_a_deadline_frees_the_row(server: Running, client: Client):
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        client.generate(PROMPT, ignore_eos=True, timeout=0.3)
    assert time.monotonic() - started < 3
    server.settle(peftmux_requests_running=0, peftmux_kv_cache_usage_ratio=0)


def test_a_slow_reader_loses_nothing(client: Client):
    options: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 300}
    whole = client.generate(PROMPT, **options)
    pieces = []
    for number, chunk in enumerate(client.stream(PROMPT, **options)):
        pieces.append(chunk.text)
        if number < 5:
            time.sleep(0.1)
    assert "".join(pieces) == whole.text


def test_the_same_seed_gives_the_same_tokens(client: Client):
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 24, "ignore_eos": True}
    first = client.generate(PROMPT, seed=7, **options)
    assert client.generate(PROMPT, seed=7, **options).token_ids == first.token_ids
    assert client.generate(PROMPT, seed=8, **options).token_ids != first.token_ids
    assert client.generate(PROMPT, **options).token_ids != client.generate(PROMPT, **options).token_ids


async def test_the_async_client(server: Running, client: Client):
    alone = client.generate(PROMPT, **GREEDY)
    async with AsyncClient(server.grpc, timeout=60) as connected:
        chunks = [chunk async for chunk in connected.stream(PROMPT, **GREEDY)]
        assert "".join(chunk.text for chunk in chunks) == alone.text
        assert (await connected.generate(PROMPT, **GREEDY)).token_ids == alone.token_ids


def test_health_and_reflection(server: Running):
    with grpc.insecure_channel(server.grpc) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", "peftmux.v1.InferenceService", "peftmux.v1.AdapterService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflect: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflect.ServerReflectionInfo(iter([ask]), timeout=10)
        assert "peftmux.v1.InferenceService" in {service.name for service in answer.list_services_response.service}


def test_metrics_follow_the_work(server: Running, client: Client):
    before = server.scrape()
    client.generate(PROMPT, adapter="start", **GREEDY)
    list(client.stream(PROMPT, **GREEDY))
    after = server.scrape()

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    assert grown("peftmux_generation_tokens_total") == 48
    assert grown("peftmux_prompt_tokens_total") == 2 * len(client.tokenize(PROMPT).token_ids)
    assert grown('peftmux_request_success_total{finished_reason="length"}') == 2
    assert grown('peftmux_adapter_tokens_total{adapter="start",kind="generation"}') == 24
    assert grown("peftmux_time_to_first_token_seconds_count") == 2
    assert grown("peftmux_inter_token_latency_seconds_count") > 0
    assert grown("peftmux_e2e_request_latency_seconds_count") == 2
    assert grown("peftmux_queue_time_seconds_count") == 2
    assert grown("peftmux_step_seconds_count") >= 24
    assert grown("peftmux_batch_tokens_sum") > 0
    assert after['peftmux_adapter_loaded{adapter="start",level="device",pinned="false"}'] == 1
    assert after["peftmux_adapter_load_seconds_count"] >= 1
    rows = [name for name in after if name.startswith("vllm:lora_requests_info")]
    assert len(rows) == 1
    assert 'running_lora_adapters="start"' in rows[0]


def peftmux(server: Running, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "peftmux.cli.main", *arguments, "--server", server.grpc]
    return subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=120, check=False)


def test_the_command_line_asks(server: Running, client: Client):
    whole = client.generate(PROMPT, **GREEDY)
    asked = peftmux(server, "generate", PROMPT, "--temperature", "0", "--max-tokens", "24", "--ignore-eos")
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, whole.text + "\n", "")
    flags = ("--json", "--temperature", "0", "--max-tokens", "24", "--ignore-eos", "--adapter", "start")
    answer = json.loads(peftmux(server, "generate", "-", *flags, stdin=PROMPT).stdout)
    assert answer["text"] == client.generate(PROMPT, adapter="start", **GREEDY).text
    assert answer["finish_reason"] == "length"


def test_the_command_line_classifies_and_embeds(server: Running, client: Client):
    for kind in ("seq", "token"):
        client.load_adapter(kind, f"lora.{kind}_cls")
    whole = client.classify(PROMPT, adapter="seq")
    shown = peftmux(server, "classify", PROMPT, "--adapter", "seq").stdout.splitlines()
    assert shown[0].split()[1] == whole.rows[0].label
    assert {line.split()[1] for line in shown} == set(whole.labels)
    rows = peftmux(server, "classify", "-", "--adapter", "token", stdin=PROMPT).stdout.splitlines()
    assert [row.split()[1] for row in rows] == [row.label for row in client.classify(PROMPT, adapter="token").rows]
    assert [row.split()[2] for row in rows] == list(client.tokenize(PROMPT).pieces)
    vector = client.embed(PROMPT, adapter="start", pooling="last", normalize=True)
    flags = ("--adapter", "start", "--pooling", "last", "--normalize")
    asked = peftmux(server, "embed", PROMPT, *flags).stdout.split()
    assert [float(value) for value in asked] == pytest.approx(vector.values, abs=1e-6)
    assert json.loads(peftmux(server, "embed", PROMPT, "--json").stdout)["usage"]["completion_tokens"] == 0
    refused = peftmux(server, "classify", PROMPT, "--adapter", "start")
    assert refused.stderr.startswith("peftmux classify: TASK_MISMATCH: expected an adapter with a classification head")
    refused = peftmux(server, "generate", PROMPT, "--adapter", "seq")
    assert refused.stderr.startswith("peftmux generate: TASK_MISMATCH: ")


def test_the_command_line_keeps_adapters(server: Running, client: Client):
    loaded = peftmux(server, "adapters", "load", "cli", "lora", "--json")
    assert json.loads(loaded.stdout)[0]["state"] == "ready"
    assert "cli" in peftmux(server, "adapters", "list").stdout
    assert "kind                lora" in peftmux(server, "adapters", "get", "cli").stdout
    assert "unloaded" in peftmux(server, "adapters", "unload", "cli").stdout
    gone = peftmux(server, "adapters", "get", "cli")
    assert (gone.returncode, gone.stdout) == (1, "")
    assert gone.stderr.startswith("peftmux adapters: ADAPTER_NOT_FOUND: ")


def test_inspect_judges_as_a_server_would(client: Client, capsys):
    def inspect(name: str) -> tuple[int, str, str]:
        folder, base = str(FIXTURES / "peft" / "llama" / name), str(FIXTURES / "base" / "llama")
        status = main(["adapters", "inspect", folder, "--model", base, "--json"])
        return (status, *capsys.readouterr())

    status, out, _ = inspect("lora_dora")
    fields = json.loads(out)
    loaded = client.load_adapter("dora", "lora_dora")
    assert (status, fields["kind"], fields["revision"]) == (0, "dora", loaded.revision)
    assert (fields["tensors"], fields["applied_sites"]) == (loaded.tensors, loaded.applied_sites)
    for name, virtual in {"ia3": 0, "prefix": 5, "prompt_text": 6, "multitask_prompt": 5}.items():
        fields = json.loads(inspect(name)[1])
        assert fields["bytes"] == client.load_adapter(name, name).bytes > 0
        assert fields["virtual_tokens"] == virtual
        reads = virtual * 3 * 2 * 4 * (8 + 8)  # layers, a product and a sum, query heads, key and value
        assert fields["flops_per_token"] == (reads or 3 * (64 + 2 * 16))
    status, _, err = inspect("miss")
    assert status == 1
    assert err.splitlines()[-1].startswith("peftmux adapters: UNSUPPORTED_METHOD: ")
