"""The error table: every class has a row, and every row arrives as code, reason and details."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from peftmux.adapters import errors as adapters
from peftmux.runtime import errors as runtime
from peftmux.runtime.server.errors import TABLE, InvalidFields, MalformedRequest, RequestRefused, describe
from peftmux.runtime.server.errors import Unauthenticated as NoToken
from peftmux.runtime.server.status import details


def tree(base: type[Exception]) -> list[type[Exception]]:
    return [base, *(cls for child in base.__subclasses__() for cls in tree(child))]


def make(cls: type[Exception]) -> Exception:
    if issubclass(cls, runtime.InvalidRequest | adapters.AdapterInvalid):
        return cls("SOME_THING", "expected a, got b")
    if issubclass(cls, InvalidFields):
        return cls((("sampling.top_p", "expected a, got b"),))
    return cls("expected a, got b")


ALL = tree(runtime.RuntimeFailure) + tree(adapters.AdapterError)


@pytest.mark.parametrize("cls", ALL + tree(RequestRefused)[1:], ids=lambda cls: cls.__name__)
def test_every_error_has_a_row_of_its_own(cls):
    assert cls in TABLE
    failure = describe(make(cls))
    assert failure.code is TABLE[cls][0]
    assert "expected a, got b" in failure.message


def test_the_table_is_the_contract():
    """API.md's table, as a frozen surface."""
    code = grpc.StatusCode
    assert {cls.__name__: (row[0], row[1]) for cls, row in TABLE.items()} == {
        "RuntimeFailure": (code.INTERNAL, "INTERNAL"),
        "InvalidRequest": (code.INVALID_ARGUMENT, "INVALID_FIELD"),
        "AdapterNotFound": (code.NOT_FOUND, "ADAPTER_NOT_FOUND"),
        "AdapterExists": (code.ALREADY_EXISTS, "ADAPTER_EXISTS"),
        "AdapterLoading": (code.UNAVAILABLE, "ADAPTER_LOADING"),
        "TaskMismatch": (code.FAILED_PRECONDITION, "TASK_MISMATCH"),
        "Draining": (code.UNAVAILABLE, "DRAINING"),
        "QueueFull": (code.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
        "AdapterMemoryExhausted": (code.RESOURCE_EXHAUSTED, "ADAPTER_MEMORY_EXHAUSTED"),
        "DeadlineExceeded": (code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
        "UnsupportedModel": (code.FAILED_PRECONDITION, "UNSUPPORTED_MODEL"),
        "NotFinite": (code.INTERNAL, "NOT_FINITE"),
        "StepFailed": (code.INTERNAL, "STEP_FAILED"),
        "EngineDead": (code.UNAVAILABLE, "ENGINE_DEAD"),
        "AdapterError": (code.FAILED_PRECONDITION, "ADAPTER_INVALID"),
        "AdapterInvalid": (code.FAILED_PRECONDITION, "ADAPTER_INVALID"),
        "SourceNotFound": (code.NOT_FOUND, "SOURCE_NOT_FOUND"),
        "SourceForbidden": (code.INVALID_ARGUMENT, "SOURCE_FORBIDDEN"),
        "InvalidFields": (code.INVALID_ARGUMENT, "INVALID_FIELD"),
        "MalformedRequest": (code.INVALID_ARGUMENT, "MALFORMED_REQUEST"),
        "RequestTooLarge": (code.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE"),
        "Unauthenticated": (code.UNAUTHENTICATED, "UNAUTHENTICATED"),
    }
    assert {MalformedRequest, NoToken} <= TABLE.keys()


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_only_what_can_be_tried_again_says_when(cls):
    """UNAVAILABLE and RESOURCE_EXHAUSTED ask for a retry; a dead engine does not come back."""
    failure = describe(make(cls))
    retryable = failure.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert (failure.retry_after is not None) == (retryable and cls is not runtime.EngineDead)


def test_a_subclass_without_a_row_takes_its_parents():
    class Special(adapters.AdapterInvalid):
        pass

    assert describe(Special("ODD", "x")).reason == "ODD"
    assert describe(Special("ODD", "x")).code is grpc.StatusCode.FAILED_PRECONDITION


def test_the_unexpected_is_logged_and_not_told(caplog):
    failure = describe(KeyError("/secret/path"))
    assert failure.code is grpc.StatusCode.INTERNAL
    assert "secret" not in failure.message
    incident = failure.message.rsplit(" ", 1)[1]
    assert incident in caplog.text
    assert "/secret/path" in caplog.text


def test_a_source_outside_names_its_field():
    assert describe(adapters.SourceForbidden("outside")).violations == (("source", "outside"),)
    assert describe(runtime.InvalidRequest("stopping.stop", "bad")).violations == (("stopping.stop", "bad"),)


def test_details_fit_the_metadata_whatever_the_message():
    """gRPC refuses trailing metadata past 8 KiB: the failure would be lost."""
    many = tuple((f"token_ids.ids[{i}]" * 50, "é" * 5000) for i in range(100))
    serialised = details(describe(InvalidFields(many)), "peftmux.v1.InferenceService")
    assert len(serialised) < 7000
    status = status_pb2.Status.FromString(serialised)
    assert status.message.endswith(" ...")
    bad = error_details_pb2.BadRequest()
    assert status.details[1].Unpack(bad)
    assert len(bad.field_violations) == 8
