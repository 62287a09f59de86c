"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar, Unpack

import grpc
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


class Client:
    """Calls one server; threads may share it. Every failed call raises a class of `peftmux.client.errors`.

    A call that the server refuses for now (UNAVAILABLE or RESOURCE_EXHAUSTED with a time to try again) is tried again
    up to `retries` times within its timeout. A stream is tried again only before its first chunk.
    """

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
            self._channel = grpc.insecure_channel(target, options=wire.OPTIONS)
        else:
            self._channel = grpc.secure_channel(target, tls.credentials(), options=wire.OPTIONS)
        self._target = target
        self._metadata = wire.metadata(token)
        self._timeout = timeout
        self._retries = retries

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def wait_ready(self, timeout: float | None = None) -> None:
        """Return once the server can be reached; Unavailable if that takes longer than `timeout` seconds."""
        try:
            grpc.channel_ready_future(self._channel).result(timeout)
        except grpc.FutureTimeoutError:
            raise Unavailable(f"no server at {self._target} after {timeout:g} s", code="UNAVAILABLE") from None

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """The whole answer."""
        request = messages.request(inference_pb2.GenerateRequest, prompt, options)
        return messages.generation(self._call(wire.GENERATE, request, options.get("timeout")))

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Iterator[Chunk]:
        """The answer as it is made. Closing the iterator cancels the request."""
        request = messages.request(inference_pb2.GenerateStreamRequest, prompt, options)
        return self._stream(wire.GENERATE_STREAM, request, options.get("timeout"), messages.chunk)

    def classify(
        self, prompt: PlainPrompt, *, adapter: str, adapter_task: int | None = None, timeout: float | None = None
    ) -> Classification:
        """What the adapter's head says of the prompt, or of each of its tokens."""
        request = messages.classify_request(prompt, adapter, adapter_task)
        return messages.classification(self._call(wire.CLASSIFY, request, timeout))

    def embed(
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
        return messages.embedding(self._call(wire.EMBED, request, timeout))

    def tokenize(self, text: str, *, timeout: float | None = None) -> Tokens:
        return messages.tokens(self._call(wire.TOKENIZE, inference_pb2.TokenizeRequest(text=text), timeout))

    def model(self, *, timeout: float | None = None) -> Model:
        return messages.model(self._call(wire.GET_MODEL, inference_pb2.GetModelRequest(), timeout))

    def load_adapter(
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
        return messages.adapter(self._call(wire.LOAD_ADAPTER, request, timeout).adapter)

    def unload_adapter(self, name: str, *, wait: bool = True, timeout: float | None = None) -> Adapter:
        request = adapters_pb2.UnloadAdapterRequest(name=name, wait=wait)
        return messages.adapter(self._call(wire.UNLOAD_ADAPTER, request, timeout).adapter)

    def get_adapter(self, name: str, *, timeout: float | None = None) -> Adapter:
        request = adapters_pb2.GetAdapterRequest(name=name)
        return messages.adapter(self._call(wire.GET_ADAPTER, request, timeout).adapter)

    def list_adapters(self, *, timeout: float | None = None) -> tuple[Adapter, ...]:
        response = self._call(wire.LIST_ADAPTERS, adapters_pb2.ListAdaptersRequest(), timeout)
        return tuple(map(messages.adapter, response.adapters))

    def update_adapter(
        self, name: str, *, pinned: bool | None = None, weight: float | None = None, timeout: float | None = None
    ) -> Adapter:
        """Change what is not None. `weight` is the adapter's share in fair scheduling, above 0."""
        given = {"pinned": pinned, "weight": weight}
        chosen: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
        request = adapters_pb2.UpdateAdapterRequest(name=name, **chosen)
        return messages.adapter(self._call(wire.UPDATE_ADAPTER, request, timeout).adapter)

    def watch_adapters(self, *, timeout: float | None = None) -> Iterator[Adapter]:
        """Every adapter as it is, then each change. Closing the iterator ends it; `timeout` is for all of it."""
        request = adapters_pb2.WatchAdaptersRequest()
        return self._stream(wire.WATCH_ADAPTERS, request, timeout, lambda response: messages.adapter(response.adapter))

    def _attempts(self, timeout: float | None) -> wire.Attempts:
        return wire.Attempts(self._timeout if timeout is None else timeout, self._retries)

    def _call(self, method: wire.Method, request: Message, timeout: float | None) -> Any:
        call = method.on(self._channel)
        attempts = self._attempts(timeout)
        while True:
            try:
                return call(request, timeout=attempts.remaining(), metadata=self._metadata)
            except grpc.RpcError as error:
                self._wait(attempts, translate(error))

    def _stream(
        self, method: wire.Method, request: Message, timeout: float | None, read: Callable[[Any], T]
    ) -> Iterator[T]:
        call = method.on(self._channel, "unary_stream")
        attempts = self._attempts(timeout)
        started = False
        while True:
            responses = call(request, timeout=attempts.remaining(), metadata=self._metadata)
            try:
                for response in responses:
                    started = True
                    yield read(response)
                return
            except grpc.RpcError as error:
                failure = translate(error)
                if started:
                    raise failure from None
                self._wait(attempts, failure)
            finally:
                responses.cancel()

    @staticmethod
    def _wait(attempts: wire.Attempts, failure: RpcError) -> None:
        """Sleep until the next try, or raise `failure` if there is none."""
        delay = attempts.delay(failure)
        if delay is None:
            raise failure from None
        time.sleep(delay)
