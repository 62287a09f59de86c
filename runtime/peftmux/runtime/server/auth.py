"""Bearer tokens: who may call. Only the health service is open."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import grpc.aio

from peftmux.runtime.server.errors import Unauthenticated, describe
from peftmux.runtime.server.metrics import RpcMetrics
from peftmux.runtime.server.status import abort

_OPEN = "/grpc.health.v1.Health/"
_SCHEME = "bearer "
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Tokens:
    """The tokens that may call. Only their digests are kept, and compared, so that timing tells nothing of them."""

    def __init__(self, tokens: list[str]) -> None:
        self._digests = frozenset(map(_digest, tokens))

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """One token a line; empty lines and lines that begin with '#' are skipped. ValueError where there is none."""
        lines = [line.strip() for line in path.read_text().splitlines()]
        tokens = [line for line in lines if line and not line.startswith("#")]
        if not tokens:
            raise ValueError(f"expected at least one token in {path}, one a line, got none")
        return cls(tokens)

    def check(self, authorization: str | None) -> None:
        """Raises Unauthenticated unless this `authorization` metadata carries one of the tokens."""
        if authorization is None:
            raise Unauthenticated("expected metadata 'authorization: Bearer TOKEN', got none")
        if not authorization.lower().startswith(_SCHEME):
            raise Unauthenticated("expected metadata 'authorization: Bearer TOKEN', got another scheme")
        if _digest(authorization[len(_SCHEME) :].strip()) not in self._digests:
            raise Unauthenticated("the bearer token is not one of this server's")


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call without a good token, reflection and unknown methods included."""

    def __init__(self, tokens: Tokens, metrics: RpcMetrics) -> None:
        self._tokens = tokens
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        path: str = handler_call_details.method
        if path.startswith(_OPEN):
            return await continuation(handler_call_details)
        try:
            self._tokens.check(_authorization(handler_call_details))
        except Unauthenticated as error:
            return self._refusal(path, error)
        return await continuation(handler_call_details)

    def _refusal(self, path: str, error: Unauthenticated) -> Handler:
        service, _, method = path.lstrip("/").rpartition("/")
        failure = describe(error)
        self._metrics.denied(service, method, failure.code.name)

        async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            await abort(context, failure, service)

        return grpc.stream_stream_rpc_method_handler(refuse)


def _authorization(details: grpc.HandlerCallDetails) -> str | None:
    values = [value for key, value in details.invocation_metadata or () if key == "authorization"]
    return str(values[0]) if values else None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
