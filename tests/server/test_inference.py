"""InferenceService over a real port: what arrives at the engine, what comes back, and every way it can fail."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from dataclasses import replace
from random import Random
from typing import Any, cast

import grpc
import pytest

from peftmux.adapters import errors as adapters
from peftmux.runtime import errors as runtime
from peftmux.runtime.engine.api import EmbeddingRequest, Pooling
from peftmux.runtime.server.pace import Pace
from peftmux.v1 import inference_pb2 as pb
from tests.server.conftest import CONTEXT, VOCABULARY, Served, adapter_info, answer_of

CODE = grpc.StatusCode


def ids(count: int = 3, **fields) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=range(count)), **fields)


def stream_ids(count: int = 3, max_tokens: int = 3, **fields) -> pb.GenerateStreamRequest:
    return pb.GenerateStreamRequest(
        token_ids=pb.TokenIds(ids=range(count)), stopping=pb.StoppingParams(max_tokens=max_tokens), **fields
    )


async def until(condition) -> None:
    """Wait for a condition that must come within two seconds."""
    end = time.monotonic() + 2
    while not condition():
        assert time.monotonic() < end, "the condition never came"
        await asyncio.sleep(0.002)


async def test_generate_answers_with_all_of_it(served: Served):
    options = pb.OutputOptions(logprobs=1, prompt_logprobs=0)
    response = await served.inference.Generate(ids(output=options))
    assert response.text == "<0><1><2>"
    assert list(response.token_ids) == [0, 1, 2]
    assert [(lp.token_id, lp.logprob) for lp in response.logprobs] == [(0, -0.5), (1, -0.5), (2, -0.5)]
    assert [(top.token_id, top.logprob) for top in response.logprobs[2].top] == [(2, -0.5), (3, -1.5)]
    assert [lp.HasField("logprob") for lp in response.prompt_logprobs] == [False, True, True]
    assert response.finish_reason == pb.FINISH_REASON_LENGTH
    usage = response.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (3, 3, 1)
    assert response.adapter_revision == ""


async def test_a_stream_is_the_same_in_pieces(served: Served):
    options = pb.OutputOptions(logprobs=0, prompt_logprobs=0)
    messages = [m async for m in served.inference.GenerateStream(stream_ids(output=options))]
    assert [m.text for m in messages] == ["<0>", "<1>", "<2>"]
    assert [list(m.token_ids) for m in messages] == [[0], [1], [2]]
    assert [len(m.prompt_logprobs) for m in messages] == [3, 0, 0]
    assert [m.finish_reason for m in messages] == [0, 0, pb.FINISH_REASON_LENGTH]
    assert [m.HasField("usage") for m in messages] == [False, False, True]


async def test_the_whole_request_reaches_the_engine(served: Served):
    served.engine.adapters["org/a"] = adapter_info("org/a")
    response = await served.inference.Generate(ids(adapter="org/a@abc", priority=-4), timeout=20)
    request = served.engine.requests[0]
    assert (request.adapter, request.priority, request.prompt) == ("org/a@abc", -4, (0, 1, 2))
    assert request.deadline is not None
    assert 15 < request.deadline - time.monotonic() < 21
    assert response.adapter_revision == "abc"


async def test_only_a_stream_asks_for_pieces(served: Served):
    await served.inference.Generate(ids())
    _ = [m async for m in served.inference.GenerateStream(stream_ids())]
    assert [request.stream for request in served.engine.requests] == [False, True]


async def test_no_deadline_is_none(served: Served):
    await served.inference.Generate(ids())
    assert served.engine.requests[0].deadline is None


@pytest.mark.parametrize("text", ["hi", "x" * 100])
async def test_text_is_encoded_by_the_engine(served: Served, text):
    await served.inference.Generate(pb.GenerateRequest(text=text))
    assert served.engine.requests[0].prompt == tuple(map(ord, text))


async def test_long_text_is_encoded_off_the_loop_and_refused_by_length(served: Served):
    failure = await answer_of(served.inference.Generate(pb.GenerateRequest(text="x" * 10_000)))
    assert failure.code is CODE.INVALID_ARGUMENT
    assert "fewer tokens than the context of 128" in failure.fields["text"]
    assert "10000 tokens" in failure.fields["text"]


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_short_text_behind_a_long_one_does_not_stop_the_streams(served: Served, monkeypatch, leaves):
    """One lock guards the tokenizer, and a long text holds it: also when its caller has gone."""
    lock, begun, done = threading.Lock(), threading.Event(), threading.Event()
    encode = served.engine.encode

    def locked(text: str) -> tuple[int, ...]:
        with lock:
            if len(text) > 1000:
                begun.set()
                done.wait(3.0)
            return encode(text)

    monkeypatch.setattr(served.engine, "encode", locked)
    long = served.inference.Tokenize(pb.TokenizeRequest(text="x" * 10_000))
    await until(begun.is_set)
    if leaves:
        long.cancel()
        await asyncio.sleep(0.05)
    started = time.monotonic()
    short = asyncio.ensure_future(served.inference.Tokenize(pb.TokenizeRequest(text="hi")))
    await asyncio.sleep(0.05)
    messages = [m async for m in served.inference.GenerateStream(stream_ids())]
    assert len(messages) == 3
    assert time.monotonic() - started < 2.0
    done.set()
    assert list((await short).token_ids) == [ord("h"), ord("i")]
    if not leaves:
        assert len((await long).token_ids) == 10_000


async def test_calls_that_send_one_message_slow_no_stream(served: Served, monkeypatch):
    active: list[int] = []

    async def wait(pace: Pace) -> None:
        active.append(pace.active)

    monkeypatch.setattr(Pace, "wait", wait)
    served.engine.seconds_per_token = 0.05
    stopping = pb.StoppingParams(max_tokens=100)
    unary = [asyncio.ensure_future(served.inference.Generate(ids(stopping=stopping))) for _ in range(8)]
    await until(lambda: served.engine.created == 8)
    assert len([m async for m in served.inference.GenerateStream(stream_ids())]) == 3
    assert active == [1, 1]
    for call in unary:
        call.cancel()


async def test_chat_is_rendered_by_the_engine(served: Served):
    turns = [pb.ChatMessage(role="user", content="a"), pb.ChatMessage(role="assistant", content="")]
    await served.inference.Generate(pb.GenerateRequest(chat=pb.ChatMessages(messages=turns)))
    assert served.engine.requests[0].prompt == tuple(map(ord, "user:a;assistant:;"))


async def test_a_template_that_refuses_is_the_callers_error(served: Served):
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="alien", content="a")])
    failure = await answer_of(served.inference.Generate(pb.GenerateRequest(chat=chat)))
    assert failure.code is CODE.INVALID_ARGUMENT
    assert failure.fields == {"chat": "the chat template refuses the role 'alien'"}


async def test_bad_fields_arrive_as_violations(served: Served):
    failure = await answer_of(served.inference.Generate(ids(sampling=pb.SamplingParams(top_p=2, temperature=-1))))
    assert failure.code is CODE.INVALID_ARGUMENT
    assert failure.status.code == CODE.INVALID_ARGUMENT.value[0]
    assert (failure.info.reason, failure.info.domain) == ("INVALID_FIELD", "peftmux.v1.InferenceService")
    assert failure.fields == {
        "sampling.temperature": "expected a finite number >= 0, got -1",
        "sampling.top_p": "expected a number in (0, 1], got 2",
    }
    assert "sampling.top_p: expected a number in (0, 1], got 2" in failure.message
    assert served.engine.created == 0


async def test_a_stream_is_checked_like_a_call(served: Served):
    failure = await answer_of(served.inference.GenerateStream(pb.GenerateStreamRequest()).read())
    assert failure.code is CODE.INVALID_ARGUMENT
    assert list(failure.fields) == ["input"]


async def test_an_unknown_adapter_is_not_found(served: Served):
    failure = await answer_of(served.inference.Generate(ids(adapter="nobody")))
    assert (failure.code, failure.info.reason) == (CODE.NOT_FOUND, "ADAPTER_NOT_FOUND")
    failure = await answer_of(served.inference.Generate(ids(adapter="nobody", adapter_task=1)))
    assert failure.code is CODE.NOT_FOUND


async def test_a_task_on_an_adapter_without_tasks_is_the_callers_error(served: Served):
    served.engine.adapters["a"] = adapter_info("a")
    failure = await answer_of(served.inference.Generate(ids(adapter="a", adapter_task=1)))
    assert failure.code is CODE.INVALID_ARGUMENT
    assert failure.fields == {"adapter_task": "expected unset, a lora adapter without tasks"}


async def test_a_weighted_sum_reaches_the_engine(served: Served):
    weighted = [pb.WeightedAdapter(adapter="a", weight=0.5), pb.WeightedAdapter(adapter="b@0123456789", weight=-2)]
    await served.inference.Generate(ids(adapters=weighted))
    assert [(term.adapter, term.weight) for term in served.engine.requests[-1].adapters] == [
        ("a", 0.5),
        ("b@0123456789", -2.0),
    ]


@pytest.mark.parametrize(
    ("error", "code", "retry"),
    [
        (runtime.QueueFull("256 requests wait"), CODE.RESOURCE_EXHAUSTED, 0.5),
        (runtime.AdapterMemoryExhausted("pins hold it"), CODE.RESOURCE_EXHAUSTED, 1.0),
        (runtime.AdapterLoading("its first load"), CODE.UNAVAILABLE, 0.5),
        (runtime.Draining("going"), CODE.UNAVAILABLE, 1.0),
        (runtime.EngineDead("the thread failed"), CODE.UNAVAILABLE, None),
        (runtime.DeadlineExceeded("cannot be met"), CODE.DEADLINE_EXCEEDED, None),
        (adapters.AdapterInvalid("UNUSED_TENSOR", "expected a, got b"), CODE.FAILED_PRECONDITION, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
@pytest.mark.parametrize("streaming", [False, True])
async def test_the_engines_errors_arrive(served: Served, error, code, retry, streaming):
    served.engine.error = error
    call = served.inference.GenerateStream(stream_ids()).read() if streaming else served.inference.Generate(ids())
    failure = await answer_of(call)
    assert (failure.code, failure.message) == (code, str(error))
    seconds = failure.retry.retry_delay.ToTimedelta().total_seconds() if failure.retry else None
    assert seconds == retry


@pytest.mark.parametrize("streaming", [False, True])
async def test_nothing_leaks_of_an_unexpected_error(served: Served, streaming, caplog):
    served.engine.error = ZeroDivisionError("at /secret/engine.py")
    call = served.inference.GenerateStream(stream_ids()).read() if streaming else served.inference.Generate(ids())
    with caplog.at_level(logging.ERROR, "peftmux"):
        failure = await answer_of(call)
    assert (failure.code, failure.info.reason) == (CODE.INTERNAL, "INTERNAL")
    assert b"secret" not in failure.raw
    assert b"Traceback" not in failure.raw
    assert "secret" not in failure.message
    assert "ZeroDivisionError" in caplog.text
    served.engine.error = None
    assert (await served.inference.Generate(ids())).text == "<0><1><2>"


async def test_classify(served: Served):
    served.engine.adapters["a"] = adapter_info("a")
    request = pb.ClassifyRequest(adapter="a", token_ids=pb.TokenIds(ids=[7, 3]))
    response = await served.inference.Classify(request, timeout=20)
    assert [list(row.logits) for row in response.rows] == [[7, 0], [3, 0]]
    assert [list(row.probabilities) for row in response.rows] == [[0.75, 0.25]] * 2
    assert [row.label for row in response.rows] == ["yes", "yes"]
    assert list(response.labels) == ["yes", "no"]
    usage = response.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (2, 0, 1)
    assert response.adapter_revision == "abc"
    (asked,) = served.engine.readouts
    assert (asked.adapter, asked.prompt, asked.task) == ("a", (7, 3), None)
    assert asked.deadline is not None
    assert 15 < asked.deadline - time.monotonic() < 21


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        (pb.POOLING_UNSPECIFIED, Pooling.MEAN),
        (pb.POOLING_MEAN, Pooling.MEAN),
        (pb.POOLING_LAST, Pooling.LAST),
    ],
)
async def test_embed(served: Served, pooling, expected):
    response = await served.inference.Embed(pb.EmbedRequest(text="ab", pooling=pooling, normalize=True))
    assert list(response.embedding) == [0.5, -0.25]
    assert (response.usage.prompt_tokens, response.adapter_revision) == (2, "")
    assert served.engine.readouts == [EmbeddingRequest((97, 98), "", expected, True)]


async def test_an_embedding_names_its_task(served: Served):
    served.engine.adapters["a"] = adapter_info("a")
    failure = await answer_of(served.inference.Embed(pb.EmbedRequest(adapter="a", adapter_task=1, text="x")))
    assert (failure.code, list(failure.fields)) == (CODE.INVALID_ARGUMENT, ["adapter_task"])


@pytest.mark.parametrize(
    ("method", "request_", "fields"),
    [
        ("Classify", pb.ClassifyRequest(adapter="?"), {"adapter", "input"}),
        ("Classify", pb.ClassifyRequest(adapter_task=1, text="x"), {"adapter_task"}),
        ("Classify", pb.ClassifyRequest(token_ids=pb.TokenIds(ids=[VOCABULARY])), {"token_ids.ids"}),
        ("Classify", pb.ClassifyRequest(token_ids=pb.TokenIds(ids=[1] * (CONTEXT + 1))), {"token_ids"}),
        ("Classify", pb.ClassifyRequest(text="x" * (CONTEXT + 1)), {"text"}),
        ("Embed", pb.EmbedRequest(text="", pooling=cast("pb.Pooling", 9)), {"text", "pooling"}),
        ("Embed", pb.EmbedRequest(token_ids=pb.TokenIds()), {"token_ids.ids"}),
        ("Embed", pb.EmbedRequest(adapter="a@", text="x"), {"adapter"}),
    ],
)
async def test_bad_fields_of_readouts_are_all_named(served: Served, method, request_, fields):
    failure = await answer_of(getattr(served.inference, method)(request_))
    assert (failure.code, failure.info.reason) == (CODE.INVALID_ARGUMENT, "INVALID_FIELD")
    assert set(failure.fields) == fields


async def test_a_context_full_of_prompt_can_be_read(served: Served):
    full = pb.TokenIds(ids=[1] * CONTEXT)
    assert (await served.inference.Embed(pb.EmbedRequest(token_ids=full))).usage.prompt_tokens == CONTEXT


READOUTS: dict[str, Any] = {"Generate": pb.GenerateRequest, "Classify": pb.ClassifyRequest, "Embed": pb.EmbedRequest}


@pytest.mark.parametrize(("kind", "prompt"), [("text", {"text": "x"}), ("token_ids", {"token_ids": {"ids": [1]}})])
@pytest.mark.parametrize("method", READOUTS)
async def test_what_the_engine_says_of_its_input_names_the_requests_field(served: Served, method, kind, prompt):
    """Beside virtual tokens, which only the engine counts, a prompt may be too long."""
    served.engine.refusal = runtime.InvalidRequest("input", "prompt: expected at most 3 tokens, got 4")
    failure = await answer_of(getattr(served.inference, method)(READOUTS[method](**prompt)))
    assert list(failure.fields) == [kind]
    assert failure.code is CODE.INVALID_ARGUMENT


async def test_an_adapter_that_cannot_is_a_failed_precondition(served: Served):
    served.engine.refusal = runtime.TaskMismatch("expected an adapter with a classification head")
    failure = await answer_of(served.inference.Classify(pb.ClassifyRequest(adapter="a", text="x")))
    assert (failure.code, failure.info.reason) == (CODE.FAILED_PRECONDITION, "TASK_MISMATCH")


async def test_tokenize(served: Served):
    response = await served.inference.Tokenize(pb.TokenizeRequest(text="abc"))
    assert list(response.token_ids) == [97, 98, 99]
    assert list(response.pieces) == ["a", "b", "c"]
    assert list((await served.inference.Tokenize(pb.TokenizeRequest())).token_ids) == []


async def test_get_model(served: Served):
    model = await served.inference.GetModel(pb.GetModelRequest())
    info = served.engine.info
    for field in model.DESCRIPTOR.fields:
        value = getattr(model, field.name)
        expected = getattr(info, field.name)
        assert (tuple(value) if field.name == "adapter_kinds" else value) == expected


async def test_unknown_methods_and_services_are_unimplemented(served: Served):
    for path in ("/peftmux.v1.InferenceService/Nothing", "/peftmux.v9.Nobody/Generate"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.channel.unary_unary(path, request_serializer=bytes)(b"")
        assert caught.value.code() is CODE.UNIMPLEMENTED


@pytest.mark.parametrize("raw", [b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x22\x02\xff\xfe", b"garbage" * 1000])
async def test_bytes_that_are_no_message_are_the_callers_error(served: Served, raw):
    for method, make in (("Generate", "unary_unary"), ("GenerateStream", "unary_stream")):
        call = getattr(served.channel, make)(f"/peftmux.v1.InferenceService/{method}")(raw)
        failure = await answer_of(call if make == "unary_unary" else call.read())
        assert (failure.code, failure.info.reason) == (CODE.INVALID_ARGUMENT, "MALFORMED_REQUEST")


async def test_a_request_past_the_size_limit_is_refused_and_the_server_goes_on(served: Served):
    failure = await answer_of(served.inference.Tokenize(pb.TokenizeRequest(text="x" * (17 << 20))))
    assert (failure.code, failure.info.reason) == (CODE.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE")
    assert "at most 16777216 bytes, got 178257" in failure.message
    assert failure.retry is None
    with pytest.raises(grpc.aio.AioRpcError) as caught:  # gRPC does not even read it
        await served.inference.Tokenize(pb.TokenizeRequest(text="x" * (65 << 20)))
    assert caught.value.code() is CODE.RESOURCE_EXHAUSTED
    assert len((await served.inference.Tokenize(pb.TokenizeRequest(text="x" * 300_000))).token_ids) == 300_000


@pytest.mark.parametrize("after", [0, 1, 5])
async def test_cancelling_a_stream_releases_the_request(served: Served, after):
    served.engine.seconds_per_token = 0.01
    call = served.inference.GenerateStream(stream_ids(max_tokens=100))
    for _ in range(after):
        await call.read()
    await until(lambda: served.engine.created == 1)
    call.cancel()
    await until(lambda: served.engine.released == 1)
    assert served.engine.tokens_made < 100


async def test_cancelling_a_call_releases_the_request(served: Served):
    served.engine.seconds_per_token = 0.01
    call = served.inference.Generate(ids(stopping=pb.StoppingParams(max_tokens=100)))
    await until(lambda: served.engine.created == 1)
    call.cancel()
    await until(lambda: served.engine.released == 1)
    assert served.engine.tokens_made < 100


async def test_cancelling_at_the_end_changes_nothing(served: Served):
    call = served.inference.GenerateStream(stream_ids())
    messages = [await call.read() for _ in range(3)]
    call.cancel()
    assert [m.text for m in messages] == ["<0>", "<1>", "<2>"]
    await until(lambda: served.engine.released == 1)
    assert (await served.inference.Generate(ids())).text == "<0><1><2>"


async def test_cancelling_one_stream_leaves_the_others(served: Served):
    served.engine.seconds_per_token = 0.005
    gone = served.inference.GenerateStream(stream_ids(max_tokens=100))
    kept = served.inference.GenerateStream(stream_ids(max_tokens=20))
    await gone.read()
    gone.cancel()
    assert "".join([m.text async for m in kept]) == "".join(f"<{i}>" for i in range(20))


async def test_a_client_that_goes_away_releases_the_request(served: Served):
    served.engine.seconds_per_token = 0.01
    async with grpc.aio.insecure_channel(served.server.grpc_address) as channel:
        stub = Served(served.server, served.engine, channel).inference
        call = stub.GenerateStream(stream_ids(max_tokens=100))
        await call.read()
    await until(lambda: served.engine.released == 1)


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_deadline_ends_the_call_and_releases_the_request(served: Served, streaming):
    served.engine.seconds_per_token = 0.02

    async def call() -> None:
        if streaming:
            _ = [m async for m in served.inference.GenerateStream(stream_ids(max_tokens=100), timeout=0.15)]
        else:
            await served.inference.Generate(ids(stopping=pb.StoppingParams(max_tokens=100)), timeout=0.15)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call()
    assert caught.value.code() is CODE.DEADLINE_EXCEEDED
    await until(lambda: served.engine.released == served.engine.created == 1)


async def test_a_slow_reader_holds_its_own_stream_back_and_no_other(served: Served):
    """Flow control reaches the engine's iterator: what is not read is not made without bound."""
    served.engine.padding = "x" * 50_000
    served.engine.info = replace(served.engine.info, context_length=10**6)
    slow = served.inference.GenerateStream(stream_ids(max_tokens=10_000))
    await slow.read()
    made = -1
    while made != served.engine.tokens_made:
        made = served.engine.tokens_made
        await asyncio.sleep(0.1)
    assert made < 2_000
    assert (await served.inference.Generate(ids())).text.startswith("<0>")
    for i in range(1, 50):
        assert list((await slow.read()).token_ids) == [i]
    slow.cancel()
    await until(lambda: served.engine.released == served.engine.created)


async def test_custom_metadata_is_no_trouble(served: Served):
    metadata = (("x-custom", "value"), ("x-custom-bin", b"\xab\xff"))
    assert (await served.inference.Generate(ids(), metadata=metadata)).text == "<0><1><2>"


async def test_many_streams_at_once(served: Served):
    served.engine.seconds_per_token = 0.001

    async def whole(count: int) -> str:
        return "".join([m.text async for m in served.inference.GenerateStream(stream_ids(max_tokens=count))])

    texts = await asyncio.gather(*(whole(count) for count in range(1, 65)))
    assert texts == ["".join(f"<{i}>" for i in range(count)) for count in range(1, 65)]
    assert served.engine.created == served.engine.released == 64


async def test_random_bytes_never_harm(served: Served):
    """Whatever arrives is answered: with a result, or with a documented code."""
    random = Random(7)
    good = stream_ids(max_tokens=2, sampling=pb.SamplingParams(top_p=0.5), adapter="a").SerializeToString()
    call: Any = served.channel.unary_unary("/peftmux.v1.InferenceService/Generate", request_serializer=bytes)

    async def send(raw: bytes) -> grpc.StatusCode:
        try:
            await call(raw)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return CODE.OK

    def mutate() -> bytes:
        raw = bytearray(good)
        for _ in range(random.randrange(1, 4)):
            raw[random.randrange(len(raw))] = random.randrange(256)
        return bytes(raw)

    codes = set()
    for _ in range(20):
        raws = [mutate() if random.random() < 0.7 else random.randbytes(random.randrange(40)) for _ in range(50)]
        codes |= set(await asyncio.gather(*map(send, raws)))
    assert codes <= {CODE.OK, CODE.INVALID_ARGUMENT, CODE.NOT_FOUND, CODE.UNIMPLEMENTED}
    assert CODE.INVALID_ARGUMENT in codes
    assert (await served.inference.Generate(ids())).text == "<0><1><2>"
    assert served.engine.created == served.engine.released
