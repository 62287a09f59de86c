"""Failed calls as exceptions, with all that the server said.

RpcError
|-- InvalidArgument       `violations` names the fields
|-- NotFound
|-- AlreadyExists
|-- FailedPrecondition    an adapter that cannot be served exactly; `reason` says why
|-- ResourceExhausted     `retry_after` says when to try again
|-- Unavailable           likewise, or no server answered
|-- DeadlineExceeded
|-- Unauthenticated
|-- PermissionDenied
|-- Unimplemented
|-- Cancelled
`-- Internal              and every code without a class of its own
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"
Violations = tuple[tuple[str, str], ...]


class RpcError(Exception):
    """Base of the tree above."""

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        reason: str = "",
        violations: tuple[tuple[str, str], ...] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        """The status code's name, e.g. "NOT_FOUND"."""
        self.reason = reason
        """google.rpc.ErrorInfo's reason, e.g. "ADAPTER_NOT_FOUND"; "" where the server gave none."""
        self.violations = violations
        """(field, what was expected and what came)."""
        self.retry_after = retry_after
        """Seconds until trying again can help; None where the server did not say that it can."""


class InvalidArgument(RpcError):
    pass


class NotFound(RpcError):
    pass


class AlreadyExists(RpcError):
    pass


class FailedPrecondition(RpcError):
    pass


class ResourceExhausted(RpcError):
    pass


class Unavailable(RpcError):
    pass


class DeadlineExceeded(RpcError):
    pass


class Unauthenticated(RpcError):
    pass


class PermissionDenied(RpcError):
    pass


class Unimplemented(RpcError):
    pass


class Cancelled(RpcError):
    pass


class Internal(RpcError):
    pass


CLASSES: dict[grpc.StatusCode, type[RpcError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
    grpc.StatusCode.CANCELLED: Cancelled,
}


def translate(error: Any) -> RpcError:
    """The exception for a failed call of grpc or grpc.aio."""
    code: grpc.StatusCode = error.code()
    reason, violations, retry_after = _details(error.trailing_metadata() or ())
    return CLASSES.get(code, Internal)(
        error.details() or code.name, code=code.name, reason=reason, violations=violations, retry_after=retry_after
    )


def _details(trailing: Iterable[tuple[str, Any]]) -> tuple[str, Violations, float | None]:
    """(reason, violations, retry_after) of the google.rpc.Status in the trailing metadata, as far as there is one."""
    status = status_pb2.Status()
    try:
        status.ParseFromString(b"".join(value for key, value in trailing if key == _DETAILS_KEY))
    except DecodeError:
        return "", (), None
    reason = ""
    violations: Violations = ()
    retry_after: float | None = None
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad):
            violations = tuple((violation.field, violation.description) for violation in bad.field_violations)
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    return reason, violations, retry_after
