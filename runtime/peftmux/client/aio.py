"""The asyncio client: `Client` with the same methods, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Self, TypeVar, Unpack

import grpc
import grpc.aio
from google.protobuf.message import Message

from peftmux.client import messages, wire
from peftmux.client.errors import RpcError, Unavailable, translate
from peftmux.client.types import (
    Adapter,
    Chunk,
    Classification,
    Embedding,
    GenerateOptions,
    Generation,
    Model,
    PlainPrompt,
    Pooling,
    Prompt,
    Tokens,
)
from peftmux.v1 import adapters_pb2, inference_pb2

T = TypeVar("T")


class AsyncClient:
    """As `peftmux.client.Client`, for one asyncio loop: make it where the loop runs."""

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        token: str | None = None,
        tls: wire.Tls | None = None,
        timeout: float | None = None,
        retries: int = 5,
    ) -> None:
        """`timeout`: seconds for a call that names none; None waits for ever."""
        if tls is None:
            self._channel = grpc.aio.insecure_channel(target, options=wire.OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(target, tls.credentials(), options=wire.OPTIONS)
        self._target = target
        self._metadata = wire.metadata(token)
        self._timeout = timeout
        self._retries = retries

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def wait_ready(self, timeout: float | None = None) -> None:
        """Return once the server can be reached; Unavailable if that takes longer than `timeout` seconds."""
        try:
            await asyncio.wait_for(self._channel.channel_ready(), timeout)
        except TimeoutError:
            raise Unavailable(f"no server at {self._target} after {timeout:g} s", code="UNAVAILABLE") from None

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """The whole answer."""
        request = messages.request(inference_pb2.GenerateRequest, prompt, options)
        return messages.generation(await self._call(wire.GENERATE, request, options.get("timeout")))

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncIterator[Chunk]:
        """The answer as it is made. Closing the iterator, or cancelling who awaits it, cancels the request."""
        request = messages.request(inference_pb2.GenerateStreamRequest, prompt, options)
        return self._stream(wire.GENERATE_STREAM, request, options.get("timeout"), messages.chunk)

    async def classify(
        self, prompt: PlainPrompt, *, adapter: str, adapter_task: int | None = None, timeout: float | None = None
    ) -> Classification:
        """What the adapter's head says of the prompt, or of each of its tokens."""
        request = messages.classify_request(prompt, adapter, adapter_task)
        return messages.classification(await self._call(wire.CLASSIFY, request, timeout))

    async def embed(
        self,
        prompt: PlainPrompt,
        *,
        adapter: str = "",
        adapter_task: int | None = None,
        pooling: Pooling | str = Pooling.MEAN,
        normalize: bool = False,
        timeout: float | None = None,
    ) -> Embedding:
        """The prompt's final hidden states, pooled; with `normalize` of length 1."""
        request = messages.embed_request(prompt, adapter, adapter_task, pooling, normalize)
        return messages.embedding(await self._call(wire.EMBED, request, timeout))

    async def tokenize(self, text: str, *, timeout: float | None = None) -> Tokens:
        return messages.tokens(await self._call(wire.TOKENIZE, inference_pb2.TokenizeRequest(text=text), timeout))

    async def model(self, *, timeout: float | None = None) -> Model:
        return messages.model(await self._call(wire.GET_MODEL, inference_pb2.GetModelRequest(), timeout))

    async def load_adapter(
        self,
        name: str,
        source: str,
        *,
        revision: str = "",
        pinned: bool = False,
        wait: bool = True,
        replace: bool = False,
        timeout: float | None = None,
    ) -> Adapter:
        """Load what lies at `source` under the server's adapter root. Without `wait` it may still be LOADING."""
        request = adapters_pb2.LoadAdapterRequest(
            name=name, source=source, revision=revision, pinned=pinned, wait=wait, replace=replace
        )
        return messages.adapter((await self._call(wire.LOAD_ADAPTER, request, timeout)).adapter)

    async def unload_adapter(self, name: str, *, wait: bool = True, timeout: float | None = None) -> Adapter:
        request = adapters_pb2.UnloadAdapterRequest(name=name, wait=wait)
        return messages.adapter((await self._call(wire.UNLOAD_ADAPTER, request, timeout)).adapter)

    async def get_adapter(self, name: str, *, timeout: float | None = None) -> Adapter:
        request = adapters_pb2.GetAdapterRequest(name=name)
        return messages.adapter((await self._call(wire.GET_ADAPTER, request, timeout)).adapter)

    async def list_adapters(self, *, timeout: float | None = None) -> tuple[Adapter, ...]:
        response = await self._call(wire.LIST_ADAPTERS, adapters_pb2.ListAdaptersRequest(), timeout)
        return tuple(map(messages.adapter, response.adapters))

    async def update_adapter(
        self, name: str, *, pinned: bool | None = None, weight: float | None = None, timeout: float | None = None
    ) -> Adapter:
        """Change what is not None. `weight` is the adapter's share in fair scheduling, above 0."""
        given = {"pinned": pinned, "weight": weight}
        chosen: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
        request = adapters_pb2.UpdateAdapterRequest(name=name, **chosen)
        return messages.adapter((await self._call(wire.UPDATE_ADAPTER, request, timeout)).adapter)

    def watch_adapters(self, *, timeout: float | None = None) -> AsyncIterator[Adapter]:
        """Every adapter as it is, then each change. Closing the iterator ends it; `timeout` is for all of it."""
        request = adapters_pb2.WatchAdaptersRequest()
        return self._stream(wire.WATCH_ADAPTERS, request, timeout, lambda response: messages.adapter(response.adapter))

    def _attempts(self, timeout: float | None) -> wire.Attempts:
        return wire.Attempts(self._timeout if timeout is None else timeout, self._retries)

    async def _call(self, method: wire.Method, request: Message, timeout: float | None) -> Any:
        call = method.on(self._channel)
        attempts = self._attempts(timeout)
        while True:
            try:
                return await call(request, timeout=attempts.remaining(), metadata=self._metadata)
            except grpc.RpcError as error:
                await self._wait(attempts, translate(error))

    async def _stream(
        self, method: wire.Method, request: Message, timeout: float | None, read: Callable[[Any], T]
    ) -> AsyncIterator[T]:
        call = method.on(self._channel, "unary_stream")
        attempts = self._attempts(timeout)
        started = False
        while True:
            responses = call(request, timeout=attempts.remaining(), metadata=self._metadata)
            try:
                async for response in responses:
                    started = True
                    yield read(response)
                return
            except grpc.RpcError as error:
                failure = translate(error)
                if started:
                    raise failure from None
                await self._wait(attempts, failure)
            finally:
                responses.cancel()

    @staticmethod
    async def _wait(attempts: wire.Attempts, failure: RpcError) -> None:
        """Sleep until the next try, or raise `failure` if there is none."""
        delay = attempts.delay(failure)
        if delay is None:
            raise failure from None
        await asyncio.sleep(delay)
