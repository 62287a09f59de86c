"""What each error is on the wire: status code, reason and details. The only table of its kind.

    error                                             code                 reason
    peftmux.runtime.errors, peftmux.adapters.errors   see TABLE
    InvalidFields, Unauthenticated, MalformedRequest, see TABLE
      RequestTooLarge (below; they exist only here)
    anything else                                     INTERNAL             INTERNAL, a fixed message and a log entry

A test walks both trees and fails for an error class that TABLE does not name.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass

import grpc

from peftmux.adapters import errors as adapters
from peftmux.runtime import errors as runtime

logger = logging.getLogger(__name__)

Violation = tuple[str, str]
"""(path of the field in the request message, what was expected and what came)."""


class RequestRefused(Exception):
    """Base of what the server itself refuses, before the engine sees it."""


class InvalidFields(RequestRefused):
    """One or more fields of the request are bad."""

    def __init__(self, violations: tuple[Violation, ...]) -> None:
        super().__init__("; ".join(f"{field}: {message}" for field, message in violations))
        self.violations = violations


class MalformedRequest(RequestRefused):
    """The bytes are not the method's request message."""


class RequestTooLarge(RequestRefused):
    """More bytes than a request message may have."""


class Unauthenticated(RequestRefused):
    """No bearer token, or none that this server knows."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One answer to a failed request; `status.trailing_metadata` writes it as google.rpc.Status."""

    code: grpc.StatusCode
    reason: str
    message: str
    violations: tuple[Violation, ...] = ()
    retry_after: float | None = None
    """Seconds, where trying again can help."""


TABLE: dict[type[Exception], tuple[grpc.StatusCode, str]] = {
    runtime.RuntimeFailure: (grpc.StatusCode.INTERNAL, "INTERNAL"),
    runtime.InvalidRequest: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
    runtime.AdapterNotFound: (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND"),
    runtime.AdapterExists: (grpc.StatusCode.ALREADY_EXISTS, "ADAPTER_EXISTS"),
    runtime.AdapterLoading: (grpc.StatusCode.UNAVAILABLE, "ADAPTER_LOADING"),
    runtime.TaskMismatch: (grpc.StatusCode.FAILED_PRECONDITION, "TASK_MISMATCH"),
    runtime.Draining: (grpc.StatusCode.UNAVAILABLE, "DRAINING"),
    runtime.QueueFull: (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    runtime.AdapterMemoryExhausted: (grpc.StatusCode.RESOURCE_EXHAUSTED, "ADAPTER_MEMORY_EXHAUSTED"),
    runtime.DeadlineExceeded: (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    runtime.UnsupportedModel: (grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED_MODEL"),
    runtime.NotFinite: (grpc.StatusCode.INTERNAL, "NOT_FINITE"),
    runtime.StepFailed: (grpc.StatusCode.INTERNAL, "STEP_FAILED"),
    runtime.EngineDead: (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD"),
    adapters.AdapterError: (grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_INVALID"),
    adapters.AdapterInvalid: (grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_INVALID"),
    adapters.SourceNotFound: (grpc.StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND"),
    adapters.SourceForbidden: (grpc.StatusCode.INVALID_ARGUMENT, "SOURCE_FORBIDDEN"),
    InvalidFields: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
    MalformedRequest: (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST"),
    RequestTooLarge: (grpc.StatusCode.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE"),
    Unauthenticated: (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
}


def describe(error: Exception) -> Failure:
    """The answer for `error`. What no row of TABLE covers is logged in full and answered without any of it."""
    row = next((TABLE[cls] for cls in type(error).__mro__ if cls in TABLE), None)
    if row is None:
        return _unexpected(error)
    code, reason = row
    if isinstance(error, adapters.AdapterInvalid):
        reason = error.reason
    retry_after = error.retry_after if isinstance(error, runtime.RuntimeFailure) else None
    message = f"{error.field}: {error}" if isinstance(error, runtime.InvalidRequest) else str(error)
    return Failure(code, reason, message, _violations(error), retry_after)


def _violations(error: Exception) -> tuple[Violation, ...]:
    if isinstance(error, InvalidFields):
        return error.violations
    if isinstance(error, runtime.InvalidRequest):
        return ((error.field, str(error)),)
    if isinstance(error, adapters.SourceForbidden):
        return (("source", str(error)),)
    return ()


def _unexpected(error: Exception) -> Failure:
    incident = secrets.token_hex(4)
    logger.error("incident %s: a request failed unexpectedly", incident, exc_info=error)
    message = f"internal error; the server's log has it as incident {incident}"
    return Failure(grpc.StatusCode.INTERNAL, "INTERNAL", message)
