"""Both clients against a scripted gRPC server: what they send, what they give back, what they try again."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2

from peftmux import client as package
from peftmux.client import (
    Adapter,
    AdapterState,
    AsyncClient,
    ChatMessage,
    Classification,
    ClassRow,
    Client,
    Embedding,
    FinishReason,
    Image,
    Residency,
    Tls,
    TokenLogprob,
    Tokens,
    Usage,
)
from peftmux.client.errors import CLASSES
from peftmux.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

Handler = Callable[[Any, grpc.ServicerContext], Any]


def fail(code: grpc.StatusCode, *, retry: float | None = None, reason: str = "", field: str = "") -> Handler:
    """A handler that always refuses, as the server's error table would."""

    def handle(request: Any, context: grpc.ServicerContext) -> None:
        status = status_pb2.Status(code=code.value[0], message="expected a, got b")
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="peftmux.v1.InferenceService"))
        if field:
            bad = error_details_pb2.BadRequest()
            bad.field_violations.add(field=field, description="expected a, got b")
            status.details.add().Pack(bad)
        if retry is not None:
            delay = duration_pb2.Duration(nanos=round(retry * 1e9))
            status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(code, status.message)

    return handle


def stream_of(*messages: Any, unary: bool = False) -> Handler:
    """A handler that answers with these messages."""
    return lambda request, context: messages[0] if unary else iter(messages)


class Script:
    """A server whose methods are set by the test, one after the other; the last one stays."""

    def __init__(self) -> None:
        self.handlers: dict[str, list[Handler]] = {}
        self.requests: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self.deadlines: list[float | None] = []
        self.cancelled = threading.Event()

    def on(self, method: str, *handlers: Any) -> None:
        """Each is a handler, or a message to answer with."""
        self.handlers[method] = [h if callable(h) else stream_of(h, unary=True) for h in handlers]

    def answer(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.deadlines.append(context.time_remaining())
        context.add_callback(self.cancelled.set)
        queue = self.handlers[method]
        return (queue.pop(0) if len(queue) > 1 else queue[0])(request, context)


class _Servicer:
    def __init__(self, script: Script) -> None:
        self._script = script

    def __getattr__(self, method: str) -> Any:
        return lambda request, context: self._script.answer(method, request, context)


@pytest.fixture
def script() -> Iterator[tuple[Script, str]]:
    server = grpc.server(ThreadPoolExecutor(4))
    scripted = Script()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(_Servicer(scripted), server)
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(_Servicer(scripted), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield scripted, f"127.0.0.1:{port}"
    server.stop(0).wait()


class Either:
    """One of the two clients, called the same way from a test."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def call(self, target: str, method: str, *args: Any, settings: dict[str, Any] | None = None, **options: Any) -> Any:
        if self.kind == "sync":
            with Client(target, **(settings or {})) as client:
                result = getattr(client, method)(*args, **options)
                return list(result) if method == "stream" else result
        return asyncio.run(self._call(target, method, args, settings or {}, options))

    async def _call(self, target: str, method: str, args: Any, settings: dict[str, Any], options: Any) -> Any:
        async with AsyncClient(target, **settings) as client:
            result = getattr(client, method)(*args, **options)
            return [item async for item in result] if method == "stream" else await result


@pytest.fixture(params=["sync", "async"])
def either(request) -> Either:
    return Either(request.param)


GENERATED = inference_pb2.GenerateResponse(
    text="hé",
    token_ids=[1, 2],
    logprobs=[inference_pb2.TokenLogprob(token_id=1, logprob=-0.5, top=[{"token_id": 3, "logprob": -1.5}])],
    prompt_logprobs=[inference_pb2.TokenLogprob(token_id=9)],
    finish_reason=inference_pb2.FINISH_REASON_STOP,
    usage=inference_pb2.Usage(prompt_tokens=4, completion_tokens=2, cached_tokens=3),
    adapter_revision="abc",
)


def test_generate_gives_everything_back(script, either):
    scripted, target = script
    scripted.on("Generate", GENERATED)
    answer = either.call(target, "generate", "x")
    assert (answer.text, answer.token_ids, answer.adapter_revision) == ("hé", (1, 2), "abc")
    assert (answer.finish_reason, answer.usage) == (FinishReason.STOP, Usage(4, 2, 3))
    assert answer.logprobs == (TokenLogprob(1, -0.5, ((3, -1.5),)),)
    assert answer.prompt_logprobs == (TokenLogprob(9, None),)


def test_every_option_is_sent_and_nothing_else(script, either):
    scripted, target = script
    scripted.on("Generate", GENERATED)
    sampling = {
        "temperature": 0.0,
        "top_p": 0.5,
        "top_k": 0,
        "min_p": 0.25,
        "seed": 0,
        "repetition_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 1.0,
        "logit_bias": {5: -2.0},
    }
    stopping = {"max_tokens": 7, "min_tokens": 1, "stop": ["a"], "stop_token_ids": [3], "ignore_eos": True}
    output = {"logprobs": 0, "prompt_logprobs": 5}
    plain = {"adapter": "a@r", "adapter_task": 0, "priority": -3}
    either.call(target, "generate", [7, 8], **sampling, **stopping, **output, **plain)
    either.call(target, "generate", "bare")
    sent, bare = scripted.requests
    assert list(sent.token_ids.ids) == [7, 8]
    for group, given in ((sent.sampling, sampling), (sent.stopping, stopping), (sent.output, output), (sent, plain)):
        for name, value in given.items():
            got = getattr(group, name)
            got = type(value)(got) if isinstance(value, list | dict) else got
            assert got == value
            if not isinstance(value, list | dict) and group.DESCRIPTOR.fields_by_name[name].has_presence:
                assert group.HasField(name)
    for group in (bare.sampling, bare.stopping, bare.output):
        assert group.ListFields() == []
    assert (bare.text, bare.adapter, bare.HasField("adapter_task")) == ("bare", "", False)


def test_a_weighted_sum_is_sent_term_by_term(script, either):
    scripted, target = script
    scripted.on("Generate", GENERATED)
    either.call(target, "generate", "a", adapters=[("x", 0.5), ("y@0123456789", -2)], adapter_task=None)
    assert [(term.adapter, term.weight) for term in scripted.requests[0].adapters] == [("x", 0.5), ("y@0123456789", -2)]


def test_images_are_sent_as_files_or_patches(script, either):
    scripted, target = script
    scripted.on("Generate", GENERATED)
    images = [Image(b"png"), Image(b"\0" * 96, rows=1, columns=2, position=0)]
    either.call(target, "generate", "a<image>b", images=images)
    file, patches = scripted.requests[0].images
    assert (file.encoded, file.HasField("position")) == (b"png", False)
    assert (patches.patches.rows, patches.patches.columns, len(patches.patches.values)) == (1, 2, 96)
    assert patches.HasField("position")
    assert patches.position == 0


def test_a_conversation_is_sent_as_chat(script, either):
    scripted, target = script
    scripted.on("Generate", GENERATED)
    either.call(target, "generate", [ChatMessage("system", "be"), ChatMessage("user", "")])
    turns = scripted.requests[0].chat.messages
    assert [(turn.role, turn.content) for turn in turns] == [("system", "be"), ("user", "")]


def test_prompts_and_options_of_other_types_are_refused_here(either):
    with pytest.raises(TypeError, match=r"str, token ids or ChatMessage values, got a sequence of ChatMessage, str"):
        either.call("127.0.0.1:1", "generate", [ChatMessage("user", "x"), "y"])
    with pytest.raises(TypeError, match=r"unknown option 'max_token'; expected one of adapter, "):
        either.call("127.0.0.1:1", "generate", "x", max_token=3)
    with pytest.raises(ValueError, match="out of range"):
        either.call("127.0.0.1:1", "generate", [-1])


def test_a_stream_comes_in_chunks(script, either):
    scripted, target = script
    message = inference_pb2.GenerateStreamResponse
    last = message(
        text="b",
        token_ids=[2],
        finish_reason=inference_pb2.FINISH_REASON_LENGTH,
        usage=inference_pb2.Usage(prompt_tokens=1),
    )
    scripted.on("GenerateStream", stream_of(message(text="a", token_ids=[1]), last))
    first, second = either.call(target, "stream", "x", max_tokens=2)
    assert (first.text, first.token_ids, first.finish_reason, first.usage) == ("a", (1,), None, None)
    assert (second.text, second.finish_reason, second.usage) == ("b", FinishReason.LENGTH, Usage(1, 0, 0))


def _endless(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
    while context.is_active():
        yield inference_pb2.GenerateStreamResponse(text="x")
        time.sleep(0.01)


def test_closing_a_stream_cancels_the_request(script):
    scripted, target = script
    scripted.on("GenerateStream", _endless)
    with Client(target) as client:
        chunks: Any = client.stream("x")
        assert next(chunks).text == "x"
        chunks.close()
        assert scripted.cancelled.wait(2)


async def test_closing_an_async_stream_cancels_the_request(script):
    scripted, target = script
    scripted.on("GenerateStream", _endless)
    async with AsyncClient(target) as client:
        chunks: Any = client.stream("x")
        assert (await anext(chunks)).text == "x"
        await chunks.aclose()
        assert await asyncio.to_thread(scripted.cancelled.wait, 2)


def test_the_other_calls(script, either):
    scripted, target = script
    scripted.on("Tokenize", inference_pb2.TokenizeResponse(token_ids=[1, 2], pieces=["a", "b"]))
    assert either.call(target, "tokenize", "ab") == Tokens((1, 2), ("a", "b"))
    scripted.on("GetModel", inference_pb2.GetModelResponse(name="m", context_length=9, adapter_kinds=["lora"]))
    model = either.call(target, "model")
    assert (model.name, model.context_length, model.adapter_kinds) == ("m", 9, ("lora",))


def test_classify(script, either):
    scripted, target = script
    rows: Any = [{"logits": [2, -1], "probabilities": [0.75, 0.25], "label": "ham"}]
    usage = inference_pb2.Usage(prompt_tokens=4, cached_tokens=3)
    scripted.on(
        "Classify",
        inference_pb2.ClassifyResponse(rows=rows, labels=["ham", "spam"], usage=usage, adapter_revision="abc"),
    )
    answer = either.call(target, "classify", "is it?", adapter="a@abc", adapter_task=0)
    assert answer == Classification((ClassRow((2, -1), (0.75, 0.25), "ham"),), ("ham", "spam"), Usage(4, 0, 3), "abc")
    (request,) = scripted.requests
    assert request == inference_pb2.ClassifyRequest(adapter="a@abc", adapter_task=0, text="is it?")
    either.call(target, "classify", [3, 4], adapter="a")
    tokens = inference_pb2.TokenIds(ids=[3, 4])
    assert scripted.requests[1] == inference_pb2.ClassifyRequest(adapter="a", token_ids=tokens)


def test_embed(script, either):
    scripted, target = script
    scripted.on("Embed", inference_pb2.EmbedResponse(embedding=[0.5, -1], usage=inference_pb2.Usage(prompt_tokens=2)))
    assert either.call(target, "embed", "x") == Embedding((0.5, -1), Usage(2, 0, 0))
    either.call(target, "embed", [1], adapter="a", adapter_task=2, pooling="last", normalize=True)
    first, second = scripted.requests
    assert first == inference_pb2.EmbedRequest(text="x", pooling=inference_pb2.POOLING_MEAN)
    tokens = inference_pb2.TokenIds(ids=[1])
    assert second == inference_pb2.EmbedRequest(
        adapter="a", adapter_task=2, token_ids=tokens, pooling=inference_pb2.POOLING_LAST, normalize=True
    )
    with pytest.raises(ValueError, match="median"):
        either.call(target, "embed", "x", pooling="median")
    with pytest.raises(TypeError, match="conversation"):
        either.call(target, "embed", [ChatMessage("user", "x")])


FULL = {
    "name": "a",
    "revision": "abc",
    "kind": "lora",
    "state": adapters_pb2.ADAPTER_STATE_READY,
    "residency": adapters_pb2.RESIDENCY_HOST,
    "pinned": True,
    "min_rank": 2,
    "max_rank": 8,
    "applied_sites": 14,
    "tensors": 42,
    "parameters": 2**40,
    "bytes": 2**41,
    "error": "e",
    "load_seconds": 1.5,
    "requests_in_flight": 3,
    "weight": 2.0,
    "source": "s",
}


def test_adapters_come_back_whole(script, either):
    scripted, target = script
    message = adapters_pb2.Adapter(**FULL)  # type: ignore[arg-type]
    expected = Adapter(**FULL | {"state": AdapterState.READY, "residency": Residency.HOST})  # type: ignore[arg-type]
    assert {field.name for field in dataclasses.fields(Adapter)} == set(adapters_pb2.Adapter.DESCRIPTOR.fields_by_name)
    scripted.on("LoadAdapter", adapters_pb2.LoadAdapterResponse(adapter=message))
    scripted.on("UnloadAdapter", adapters_pb2.UnloadAdapterResponse(adapter=message))
    scripted.on("GetAdapter", adapters_pb2.GetAdapterResponse(adapter=message))
    scripted.on("ListAdapters", adapters_pb2.ListAdaptersResponse(adapters=[message, adapters_pb2.Adapter(name="b")]))
    options = {"revision": "abc", "pinned": True, "wait": False, "replace": True}
    assert either.call(target, "load_adapter", "a", "s", **options) == expected
    assert either.call(target, "unload_adapter", "a") == expected
    assert either.call(target, "get_adapter", "a") == expected
    listed = either.call(target, "list_adapters")
    assert listed[0] == expected
    assert (listed[1].name, listed[1].state, listed[1].residency) == ("b", None, None)
    load, unload = scripted.requests[:2]
    assert (load.name, load.source, load.revision, load.pinned, load.wait, load.replace) == (
        *("a", "s", "abc", True),
        *(False, True),
    )
    assert unload.wait


@pytest.mark.parametrize("code", list(grpc.StatusCode)[1:], ids=lambda code: code.name)
def test_every_code_has_its_exception(script, either, code):
    scripted, target = script
    scripted.on("Generate", fail(code, reason="WHY", field="sampling.top_p"))
    with pytest.raises(package.RpcError) as caught:
        either.call(target, "generate", "x")
    error = caught.value
    assert type(error) is CLASSES.get(code, package.Internal)
    assert (error.code, error.reason, error.message, error.retry_after) == (code.name, "WHY", "expected a, got b", None)
    assert error.violations == (("sampling.top_p", "expected a, got b"),)
    assert len(scripted.requests) == 1


def test_a_stream_fails_with_the_same_exceptions(script, either):
    scripted, target = script
    scripted.on("GenerateStream", fail(grpc.StatusCode.NOT_FOUND, reason="ADAPTER_NOT_FOUND"))
    with pytest.raises(package.NotFound) as caught:
        either.call(target, "stream", "x")
    assert caught.value.reason == "ADAPTER_NOT_FOUND"


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_what_can_be_tried_again_is(script, either, code):
    scripted, target = script
    scripted.on("Generate", fail(code, retry=0.05), fail(code, retry=0.05), GENERATED)
    started = time.monotonic()
    assert either.call(target, "generate", "x").text == "hé"
    assert len(scripted.requests) == 3
    assert time.monotonic() - started >= 0.05 + 0.1


def test_a_stream_is_tried_again_before_its_first_chunk(script, either):
    scripted, target = script
    chunk = inference_pb2.GenerateStreamResponse(text="a")
    scripted.on("GenerateStream", fail(grpc.StatusCode.UNAVAILABLE, retry=0.01), stream_of(chunk))
    assert [c.text for c in either.call(target, "stream", "x")] == ["a"]


def test_a_stream_that_has_begun_is_never_repeated(script, either):
    scripted, target = script
    refuse = fail(grpc.StatusCode.UNAVAILABLE, retry=0.01)

    def broken(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield inference_pb2.GenerateStreamResponse(text="a")
        refuse(request, context)

    scripted.on("GenerateStream", broken)
    with pytest.raises(package.Unavailable):
        either.call(target, "stream", "x")
    assert len(scripted.requests) == 1


def test_tries_are_counted(script, either):
    scripted, target = script
    scripted.on("Generate", fail(grpc.StatusCode.RESOURCE_EXHAUSTED, retry=0.001))
    with pytest.raises(package.ResourceExhausted) as caught:
        either.call(target, "generate", "x", settings={"retries": 3})
    assert len(scripted.requests) == 4
    assert caught.value.retry_after == 0.001


def test_no_try_begins_past_the_deadline(script, either):
    scripted, target = script
    scripted.on("Generate", fail(grpc.StatusCode.UNAVAILABLE, retry=0.4))
    started = time.monotonic()
    with pytest.raises(package.Unavailable):
        either.call(target, "generate", "x", timeout=1.0)
    assert time.monotonic() - started < 1.2
    assert len(scripted.requests) == 2


def test_timeouts_become_deadlines(script, either):
    scripted, target = script
    scripted.on("Generate", GENERATED)
    either.call(target, "generate", "x", settings={"timeout": 30})
    either.call(target, "generate", "x", timeout=10, settings={"timeout": 30})
    either.call(target, "generate", "x")
    first, second, third = scripted.deadlines
    assert first is not None
    assert second is not None
    assert 25 < first < 31
    assert 5 < second < 11
    assert third is None or math.isinf(third) or third > 1e6


def test_a_deadline_that_passes(script, either):
    scripted, target = script
    scripted.on("Generate", lambda request, context: time.sleep(0.5))
    with pytest.raises(package.DeadlineExceeded):
        either.call(target, "generate", "x", timeout=0.1)


def test_the_token_is_sent(script, either):
    scripted, target = script
    scripted.on("GetModel", inference_pb2.GetModelResponse())
    either.call(target, "model", settings={"token": "secret"})
    either.call(target, "model")
    assert scripted.metadata[0]["authorization"] == "Bearer secret"
    assert "authorization" not in scripted.metadata[1]


def test_nobody_there(either):
    with pytest.raises(package.Unavailable) as caught:
        either.call("127.0.0.1:1", "model", timeout=2)
    assert (caught.value.reason, caught.value.retry_after) == ("", None)
    with pytest.raises(package.Unavailable, match=r"no server at 127\.0\.0\.1:1 after 0\.1 s"):
        either.call("127.0.0.1:1", "wait_ready", 0.1)


def test_wait_ready(script, either):
    assert either.call(script[1], "wait_ready", 5) is None


def test_tls_files_are_read(tmp_path):
    with pytest.raises(OSError, match="none"):
        Client("localhost:1", tls=Tls(ca=tmp_path / "none"))
