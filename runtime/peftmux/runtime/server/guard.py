"""What stands around every method: request bytes in, one translated failure out, the RPC counted.

This is the one boundary where exceptions become statuses. Methods know neither gRPC contexts nor statuses.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from peftmux.runtime.errors import Draining
from peftmux.runtime.server.errors import MalformedRequest, RequestTooLarge, describe
from peftmux.runtime.server.metrics import RpcMetrics
from peftmux.runtime.server.status import abort

MAX_REQUEST_BYTES = 16 << 20
"""A prompt of millions of token ids."""
MAX_MESSAGE_BYTES = 4 * MAX_REQUEST_BYTES
"""What gRPC reads at all: between the two the server answers with its own error, past it gRPC with a bare status."""

Write = Callable[[Any], Awaitable[None]]
"""Sends one response message; returns when the transport has room for the next."""
Unary = Callable[[Any, float | None], Awaitable[Message]]
"""(request, deadline in time.monotonic() seconds or None) -> response"""
Streaming = Callable[[Any, float | None, Write], Awaitable[None]]
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Rpc:
    """One method of a service."""

    service: str
    name: str
    kind: str
    """"unary" or "server_stream", as grpc_server_* metrics call it."""
    parse: Callable[[bytes], Message]


class ClientGone(Exception):
    """A message could not be sent: the call has ended on the other side, and its cancellation is on the way."""


class Guard:
    """Builds the handlers of a service. `refusing` is set once, when the drain begins."""

    def __init__(self, metrics: RpcMetrics) -> None:
        self.refusing = False
        self._metrics = metrics

    def handlers(self, service: Any, methods: Mapping[str, Any]) -> grpc.GenericRpcHandler:
        """gRPC handlers for every method of a service descriptor; `methods` has a Unary or Streaming by method name."""
        made = {}
        for method in service.methods:
            kind = "server_stream" if method.server_streaming else "unary"
            rpc = Rpc(service.full_name, method.name, kind, GetMessageClass(method.input_type).FromString)
            make = self._streaming if method.server_streaming else self._unary
            made[method.name] = make(rpc, methods[method.name])
            self._metrics.register(rpc.kind, rpc.service, rpc.name)
        return grpc.method_handlers_generic_handler(service.full_name, made)

    def _unary(self, rpc: Rpc, method: Unary) -> grpc.RpcMethodHandler[Any, Any]:
        async def handle(raw: bytes, context: Context) -> bytes:
            async with self._answering(rpc, context):
                response = await method(self._admit(rpc, raw), _deadline(context))
                return response.SerializeToString()
            raise AssertionError("a failed call has been aborted")

        return grpc.unary_unary_rpc_method_handler(handle)

    def _streaming(self, rpc: Rpc, method: Streaming) -> grpc.RpcMethodHandler[Any, Any]:
        async def handle(raw: bytes, context: Context) -> None:
            async def write(message: Message) -> None:
                try:
                    await context.write(message.SerializeToString())
                except grpc.aio.InternalError:
                    raise ClientGone from None

            async with self._answering(rpc, context):
                await method(self._admit(rpc, raw), _deadline(context), write)

        return grpc.unary_stream_rpc_method_handler(handle)

    def _admit(self, rpc: Rpc, raw: bytes) -> Message:
        if self.refusing:
            raise Draining("the server is shutting down and takes no new requests")
        if len(raw) > MAX_REQUEST_BYTES:
            raise RequestTooLarge(f"expected a request of at most {MAX_REQUEST_BYTES} bytes, got {len(raw)}")
        try:
            return rpc.parse(raw)
        except DecodeError:
            raise MalformedRequest(f"the request's {len(raw)} bytes are not a message of {rpc.name}") from None

    @asynccontextmanager
    async def _answering(self, rpc: Rpc, context: Context) -> AsyncIterator[None]:
        started = time.monotonic()
        self._metrics.started(rpc.service, rpc.name)
        code = grpc.StatusCode.OK
        try:
            yield
        except asyncio.CancelledError:
            late = context.time_remaining() == 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            raise
        except ClientGone:
            code = grpc.StatusCode.CANCELLED
        except Exception as error:
            failure = describe(error)
            code = failure.code
            await abort(context, failure, rpc.service)
        finally:
            self._metrics.handled(rpc.service, rpc.name, code.name, time.monotonic() - started)


def _deadline(context: Context) -> float | None:
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining
