"""Metric names are frozen; values are what the engine and the calls say."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from dataclasses import replace

import grpc
import pytest

from peftmux.runtime.engine.api import AdapterState, ResidencyLevel
from peftmux.runtime.engine.observer import EngineObserver
from peftmux.runtime.server import ServerMetrics
from peftmux.runtime.server.metrics import AdapterTokens
from peftmux.v1 import inference_pb2 as pb
from tests.server.conftest import Serve, Served, adapter_info, answer_of

NAMES = {
    "peftmux_requests_running": "gauge",
    "peftmux_requests_waiting": "gauge",
    "peftmux_kv_cache_usage_ratio": "gauge",
    "peftmux_prompt_tokens_total": "counter",
    "peftmux_generation_tokens_total": "counter",
    "peftmux_time_to_first_token_seconds": "histogram",
    "peftmux_inter_token_latency_seconds": "histogram",
    "peftmux_e2e_request_latency_seconds": "histogram",
    "peftmux_queue_time_seconds": "histogram",
    "peftmux_request_success_total": "counter",
    "peftmux_adapter_load_failures_total": "counter",
    "peftmux_decode_graph_failures_total": "counter",
    "peftmux_adapter_load_seconds": "histogram",
    "peftmux_adapter_loaded": "gauge",
    "peftmux_adapter_tokens_total": "counter",
    "peftmux_adapter_requests_running": "gauge",
    "peftmux_step_seconds": "histogram",
    "peftmux_batch_tokens": "histogram",
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:lora_requests_info": "gauge",
    "grpc_server_started_total": "counter",
    "grpc_server_handled_total": "counter",
    "grpc_server_handling_seconds": "histogram",
}


async def scrape(served: Served) -> str:
    url = f"http://{served.server.metrics_address}/metrics"
    return await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read().decode())


def samples(text: str, name: str) -> dict[str, float]:
    """{labels as written: value}"""
    found = re.findall(rf"^{re.escape(name)}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
    return {labels: float(value) for labels, value in found}


@pytest.fixture
async def measured(serve: Serve) -> Served:
    return await serve(metrics="127.0.0.1:0")


async def test_names_and_types_are_frozen(measured: Served):
    text = await scrape(measured)
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    assert {name: kind for name, kind in types.items() if not name.endswith("_created")} == NAMES


async def test_the_engines_reports_are_counted():
    metrics = ServerMetrics()
    observer: EngineObserver = metrics.engine
    observer.step(0.004, 33)
    observer.scheduled(0.1)
    observer.first_token(0.2)
    observer.inter_token(0.01)
    observer.inter_token(0.02)
    observer.finished("stop", 1.5, "a", 10, 5)
    observer.finished("length", 2.5, "", 7, 3)
    observer.adapter_loaded(0.3)
    observer.adapter_refused()
    observer.graphs_failed()
    value = metrics.registry.get_sample_value
    assert value("peftmux_step_seconds_sum") == 0.004
    assert value("peftmux_batch_tokens_bucket", {"le": "32.0"}) == 0
    assert value("peftmux_batch_tokens_bucket", {"le": "64.0"}) == 1
    assert value("peftmux_queue_time_seconds_sum") == 0.1
    assert value("peftmux_time_to_first_token_seconds_sum") == 0.2
    assert value("peftmux_inter_token_latency_seconds_count") == 2
    assert value("peftmux_e2e_request_latency_seconds_sum") == 4.0
    assert value("peftmux_prompt_tokens_total") == 17
    assert value("peftmux_generation_tokens_total") == 8
    assert value("peftmux_request_success_total", {"finished_reason": "stop"}) == 1
    assert value("peftmux_request_success_total", {"finished_reason": "length"}) == 1
    assert value("peftmux_adapter_load_seconds_sum") == 0.3
    assert value("peftmux_adapter_load_failures_total") == 1
    assert value("peftmux_decode_graph_failures_total") == 1
    assert metrics.engine.adapter_tokens.samples() == [("a", "prompt", 10), ("a", "generation", 5)]


def test_adapter_labels_are_bounded_and_never_go_down():
    tokens = AdapterTokens(bound=2)
    for name in ("a", "b", "c", "d"):
        tokens.add(name, prompt=1)
    assert tokens.samples() == [("a", "prompt", 1), ("b", "prompt", 1), ("other", "prompt", 2)]
    tokens.keep({"b", "c"})
    tokens.add("c", prompt=5)
    assert tokens.samples() == [("b", "prompt", 1), ("c", "prompt", 5), ("other", "prompt", 3)]


async def test_gauges_are_the_engines_state(measured: Served):
    engine = measured.engine
    engine.created = 3
    engine.waiting = {"": 1, "b": 2}
    engine.adapters = {
        "a": adapter_info("a", pinned=True),
        "b": adapter_info("b"),
        "c": adapter_info("c", residency=ResidencyLevel.HOST),
        "d": replace(adapter_info("d"), state=AdapterState.LOADING, residency=None),
    }
    text = await scrape(measured)
    engine.created = 0
    assert samples(text, "peftmux_requests_running") == samples(text, "vllm:num_requests_running") == {"": 3}
    assert samples(text, "peftmux_requests_waiting") == samples(text, "vllm:num_requests_waiting") == {"": 3}
    assert samples(text, "peftmux_kv_cache_usage_ratio") == samples(text, "vllm:kv_cache_usage_perc") == {"": 0.25}
    assert set(samples(text, "peftmux_adapter_loaded")) == {
        'adapter="a",level="device",pinned="true"',
        'adapter="b",level="device",pinned="false"',
        'adapter="c",level="host",pinned="false"',
    }
    assert list(samples(text, "vllm:lora_requests_info")) == [
        'max_lora="3",running_lora_adapters="a,b",waiting_lora_adapters="b"'
    ]


async def test_running_requests_by_adapter_are_bounded(measured: Served):
    measured.engine.running = {"": 2, **{f"a{i}": 1 for i in range(60)}}
    rows = samples(await scrape(measured), "peftmux_adapter_requests_running")
    assert rows['adapter=""'] == 2
    assert rows['adapter="other"'] == 11
    assert len(rows) == 51


async def test_one_lora_row_whatever_changes(serve: Serve):
    served = await serve(metrics="127.0.0.1:0", max_loras=8)
    for names in ([], ["a"], ["a", "b"]):
        served.engine.adapters = {name: adapter_info(name) for name in names}
        rows = list(samples(await scrape(served), "vllm:lora_requests_info"))
        assert rows == [f'max_lora="8",running_lora_adapters="{",".join(names)}",waiting_lora_adapters=""']


async def test_loaded_adapters_past_the_bound_are_other(measured: Served):
    measured.engine.adapters = {f"a{i}": adapter_info(f"a{i}", requests_in_flight=i) for i in range(60)}
    rows = samples(await scrape(measured), "peftmux_adapter_loaded")
    assert len(rows) == 51
    assert rows['adapter="other",level="device",pinned="false"'] == 10
    assert 'adapter="a59",level="device",pinned="false"' in rows


async def test_calls_are_counted_by_method_and_code(measured: Served):
    await measured.inference.Generate(pb.GenerateRequest(text="x"))
    _ = [m async for m in measured.inference.GenerateStream(pb.GenerateStreamRequest(text="x"))]
    await answer_of(measured.inference.Generate(pb.GenerateRequest()))
    await answer_of(measured.inference.Embed(pb.EmbedRequest()))
    with pytest.raises(grpc.aio.AioRpcError):
        await measured.channel.unary_unary("/peftmux.v1.InferenceService/Nothing", request_serializer=bytes)(b"")
    text = await scrape(measured)
    service = 'grpc_service="peftmux.v1.InferenceService"'
    rows = samples(text, "grpc_server_handled_total")
    assert rows == {
        f'grpc_code="OK",grpc_method="Generate",{service},grpc_type="unary"': 1,
        f'grpc_code="INVALID_ARGUMENT",grpc_method="Generate",{service},grpc_type="unary"': 1,
        f'grpc_code="OK",grpc_method="GenerateStream",{service},grpc_type="server_stream"': 1,
        f'grpc_code="INVALID_ARGUMENT",grpc_method="Embed",{service},grpc_type="unary"': 1,
    }
    started = samples(text, "grpc_server_started_total")
    assert started[f'grpc_method="Generate",{service},grpc_type="unary"'] == 2
    assert sum(started.values()) == 4
    seconds = samples(text, "grpc_server_handling_seconds_count")
    assert seconds[f'grpc_method="Generate",{service},grpc_type="unary"'] == 2


async def test_a_scrape_without_the_loop_still_answers(measured: Served):
    """The metrics port has its own thread; an engine that fails to answer loses its gauges, not the port."""

    def fail():
        raise RuntimeError("gone")

    measured.engine.stats = fail  # type: ignore[method-assign]
    text = await scrape(measured)
    assert samples(text, "peftmux_requests_running") == {}
    assert "grpc_server_started_total" in text
