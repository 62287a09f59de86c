"""A scripted engine behind a real server on a loopback port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2, status_pb2

from peftmux.runtime.engine.api import (
    AdapterInfo,
    AdapterState,
    Classification,
    ClassificationRequest,
    Delta,
    Embedding,
    EmbeddingRequest,
    EngineStats,
    GenerationRequest,
    ModelInfo,
    ResidencyLevel,
)
from peftmux.runtime.errors import AdapterNotFound, Draining, InvalidRequest
from peftmux.runtime.params import FinishReason, TokenLogprob, Usage
from peftmux.runtime.server import Server, ServerConfig, ServerMetrics
from peftmux.v1 import adapters_pb2_grpc, inference_pb2_grpc

VOCABULARY = 1000
CONTEXT = 128


class FakeEngine:
    """Answers token i with id i and text "<i>" + `padding`; any call raises `error`, where one is set.

    Counts what it creates and releases.
    """

    def __init__(self) -> None:
        self.info = ModelInfo(
            name="fake",
            architecture="FakeForCausalLM",
            vocabulary_size=VOCABULARY,
            context_length=CONTEXT,
            dtype="float32",
            device="cpu",
            parameters=12,
            adapter_kinds=("lora", "prefix"),
            max_batch_tokens=64,
            max_queued_requests=256,
        )
        self.error: Exception | None = None
        self.refusal: Exception | None = None
        """Raised by requests for work only."""
        self.healthy = True
        self.seconds_per_token = 0.0
        self.padding = ""
        self.requests: list[GenerationRequest] = []
        self.changes: asyncio.Queue[AdapterInfo] = asyncio.Queue()
        self.readouts: list[ClassificationRequest | EmbeddingRequest] = []
        self.created = 0
        self.released = 0
        self.tokens_made = 0
        self.adapters: dict[str, AdapterInfo] = {}
        self.loads: list[tuple[str, str, dict[str, Any]]] = []
        self.waiting: dict[str, int] = {}
        self.running: dict[str, int] = {}
        self._draining = False
        self._closing = False

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        self._fail()
        if self._draining:
            raise Draining("the engine is draining")
        if self.refusal is not None:
            raise self.refusal
        if request.adapter:
            self.get_adapter(request.adapter)
        if request.task is not None:
            raise InvalidRequest("adapter_task", "expected unset, a lora adapter without tasks")
        self.requests.append(request)
        self.created += 1
        try:
            async for delta in self._tokens(request):
                yield delta
        finally:
            self.released += 1

    async def classify(self, request: ClassificationRequest) -> Classification:
        """One row a token, the logits its id and 0."""
        self._accept(request)
        logits = tuple((float(token), 0.0) for token in request.prompt)
        halves = tuple((0.75, 0.25) for _ in logits)
        names = tuple("yes" for _ in logits)
        return Classification(logits, halves, names, ("yes", "no"), Usage(len(logits), 0, 1), "abc")

    async def embed(self, request: EmbeddingRequest) -> Embedding:
        self._accept(request)
        return Embedding((0.5, -0.25), Usage(len(request.prompt), 0, 1), "abc" if request.adapter else "")

    def _accept(self, request: Any) -> None:
        self._fail()
        if self.refusal is not None:
            raise self.refusal
        if request.adapter:
            self.get_adapter(request.adapter)
        if request.task is not None:
            raise InvalidRequest("adapter_task", "expected unset, a lora adapter without tasks")
        self.readouts.append(request)

    async def _tokens(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        count = request.stopping.max_tokens or 3
        prompt_logprobs = tuple(TokenLogprob(t, -1.0 if i else None) for i, t in enumerate(request.prompt))
        for i in range(count):
            if self.seconds_per_token:
                await asyncio.sleep(self.seconds_per_token)
            if self._closing:
                raise Draining("the grace is over")
            self.tokens_made += 1
            last = i == count - 1
            chosen = TokenLogprob(i, -0.5, ((i, -0.5), (i + 1, -1.5)))
            yield Delta(
                text=f"<{i}>{self.padding}",
                token_ids=(i,),
                logprobs=() if request.output.logprobs is None else (chosen,),
                prompt_logprobs=prompt_logprobs if i == 0 and request.output.prompt_logprobs is not None else (),
                finish_reason=FinishReason.LENGTH if last else None,
                usage=Usage(len(request.prompt), count, 1) if last else None,
                adapter_revision="abc" if request.adapter else "",
            )

    def encode(self, text: str) -> tuple[int, ...]:
        self._fail()
        return tuple(ord(character) % VOCABULARY for character in text)

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        if messages[0][0] == "alien":
            raise InvalidRequest("chat", "the chat template refuses the role 'alien'")
        return self.encode("".join(f"{role}:{content};" for role, content in messages))

    def encode_around(self, text: str | Sequence[tuple[str, str]], marker: str) -> tuple[tuple[int, ...], ...]:
        rendered = text if isinstance(text, str) else "".join(f"{role}:{content};" for role, content in text)
        return tuple(self.encode(piece) for piece in rendered.split(marker))

    def pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        return tuple(chr(i) for i in ids)

    async def load_adapter(self, name: str, source: str, **options: Any) -> AdapterInfo:
        self._fail()
        self.loads.append((name, source, options))
        self.adapters[name] = adapter_info(name, source=source, pinned=options["pinned"])
        return self.adapters[name]

    async def unload_adapter(self, name: str, *, wait: bool = True) -> AdapterInfo:
        return replace(self.adapters.pop(self.get_adapter(name).name), state=AdapterState.UNLOADED, residency=None)

    async def update_adapter(
        self, name: str, *, pinned: bool | None = None, weight: float | None = None
    ) -> AdapterInfo:
        given = {"pinned": pinned, "weight": weight}
        changes: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
        self.adapters[name] = replace(self.get_adapter(name), **changes)
        return self.adapters[name]

    async def watch_adapters(self) -> AsyncIterator[AdapterInfo]:
        self.created += 1
        try:
            for info in self.list_adapters():
                yield info
            while True:
                yield await self.changes.get()
        finally:
            self.released += 1

    def get_adapter(self, name: str) -> AdapterInfo:
        self._fail()
        if name.partition("@")[0] not in self.adapters:
            raise AdapterNotFound(f"no adapter {name!r}")
        return self.adapters[name.partition("@")[0]]

    def list_adapters(self) -> tuple[AdapterInfo, ...]:
        self._fail()
        return tuple(self.adapters.values())

    def stats(self) -> EngineStats:
        return EngineStats(
            running=self.created - self.released,
            waiting=sum(self.waiting.values()),
            kv_cache_usage=0.25,
            adapters=tuple(self.adapters.values()),
            running_by_adapter=self.running,
            waiting_by_adapter=self.waiting,
            healthy=self.healthy,
        )

    async def drain(self, grace_seconds: float) -> None:
        self._draining = True
        loop = asyncio.get_running_loop()
        end = loop.time() + grace_seconds
        while self.created > self.released and loop.time() < end:
            await asyncio.sleep(0.005)
        self._closing = True
        while self.created > self.released:
            await asyncio.sleep(0.005)

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error


def adapter_info(name: str, **fields: Any) -> AdapterInfo:
    """A READY adapter on the device."""
    defaults: dict[str, Any] = {"revision": "abc", "kind": "lora", "residency": ResidencyLevel.DEVICE}
    return AdapterInfo(name=name, state=AdapterState.READY, **(defaults | fields))


class Served:
    """A started server, its engine, and stubs over one channel."""

    def __init__(self, server: Server, engine: FakeEngine, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.engine = engine
        self.channel = channel
        self.inference: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        self.adapters: Any = adapters_pb2_grpc.AdapterServiceStub(channel)


class Answer:
    """A failed call, taken apart."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code = error.code()
        self.message = error.details() or ""
        trailing = {key: value for key, value in error.trailing_metadata() or ()}  # noqa: C416 (no dict() of Metadata)
        self.raw = trailing["grpc-status-details-bin"]
        self.status = status_pb2.Status.FromString(self.raw)
        self.info = self._unpack(error_details_pb2.ErrorInfo())
        self.bad_request = self._unpack(error_details_pb2.BadRequest())
        self.retry = self._unpack(error_details_pb2.RetryInfo())

    @property
    def fields(self) -> dict[str, str]:
        return {v.field: v.description for v in self.bad_request.field_violations} if self.bad_request else {}

    def _unpack(self, message: Any) -> Any:
        return next((message for detail in self.status.details if detail.Unpack(message)), None)


async def answer_of(call: Awaitable[Any]) -> Answer:
    """Await a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return Answer(caught.value)


Serve = Callable[..., Awaitable[Served]]


@pytest_asyncio.fixture
async def serve() -> AsyncIterator[Serve]:
    """serve(engine=..., **ServerConfig fields) -> Served; everything is closed after the test."""
    running: list[Served] = []

    async def start(engine: FakeEngine | None = None, **config: Any) -> Served:
        engine = engine or FakeEngine()
        fields = {"grpc": "127.0.0.1:0", "metrics": None, **config}
        server = Server(engine, ServerMetrics(), ServerConfig(**fields))
        await server.start()
        running.append(Served(server, engine, grpc.aio.insecure_channel(server.grpc_address)))
        return running[-1]

    yield start
    for served in running:
        await served.channel.close()
        await served.server.drain(0.0)


@pytest_asyncio.fixture
async def served(serve: Serve) -> Served:
    return await serve()
