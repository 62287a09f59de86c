"""Failures as gRPC carries them: google.rpc.Status in the trailing metadata."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NoReturn, TypeVar

import grpc.aio

from peftmux.runtime.server.errors import Failure, Violation

DETAILS_KEY = "grpc-status-details-bin"
_MAX_MESSAGE_BYTES = 1200
_MAX_VIOLATIONS = 8
_MAX_VIOLATION_BYTES = 300

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")


async def abort(context: grpc.aio.ServicerContext[RequestT, ResponseT], failure: Failure, domain: str) -> NoReturn:
    """End the call with `failure`. `domain` is the full name of the service that answers."""
    message = _shorten(failure.message, _MAX_MESSAGE_BYTES)
    await context.abort(failure.code, message, ((DETAILS_KEY, details(failure, domain)),))


def details(failure: Failure, domain: str) -> bytes:
    """google.rpc.Status with ErrorInfo, and BadRequest and RetryInfo where they apply, serialised.

    Everything in it is cut to a length that leaves the trailing metadata under the 8 KiB that every client accepts.
    """
    messages, status_messages = _google_rpc()
    status = status_messages.Status(code=failure.code.value[0], message=_shorten(failure.message, _MAX_MESSAGE_BYTES))
    status.details.add().Pack(messages.ErrorInfo(reason=failure.reason, domain=domain))
    if failure.violations:
        status.details.add().Pack(_bad_request(messages, failure.violations))
    if failure.retry_after is not None:
        retry = messages.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(failure.retry_after * 1e9))
        status.details.add().Pack(retry)
    serialised: bytes = status.SerializeToString()
    return serialised


def _bad_request(messages: ModuleType, violations: tuple[Violation, ...]) -> object:
    bad = messages.BadRequest()
    for field, description in violations[:_MAX_VIOLATIONS]:
        bad.field_violations.add(
            field=_shorten(field, _MAX_VIOLATION_BYTES), description=_shorten(description, _MAX_VIOLATION_BYTES)
        )
    return bad


def _shorten(text: str, limit: int) -> str:
    encoded = text.encode()
    return text if len(encoded) <= limit else encoded[:limit].decode(errors="ignore") + " ..."


@cache
def _google_rpc() -> tuple[ModuleType, ModuleType]:
    """(error_details_pb2, status_pb2), imported with the first failure: the benchmark must start without them."""
    return import_module("google.rpc.error_details_pb2"), import_module("google.rpc.status_pb2")
