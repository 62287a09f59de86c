"""Why an adapter cannot be served. Messages say what was expected and what was found.

AdapterError
|-- AdapterInvalid    it exists but cannot be served exactly; `reason` is one of Reason
|-- SourceNotFound    the source does not exist
`-- SourceForbidden   the source is outside the adapter root, or of a scheme that is not allowed
"""

from __future__ import annotations

from enum import StrEnum

_MAX_MESSAGE = 1000


class Reason(StrEnum):
    """The ErrorInfo reasons of AdapterInvalid. Clients may depend on them: add, never rename."""

    MISSING_FILE = "MISSING_FILE"
    PICKLE = "PICKLE"
    UNSUPPORTED_FORMAT = "UNSUPPORTED_FORMAT"
    MALFORMED_CONFIG = "MALFORMED_CONFIG"
    MALFORMED_TENSORS = "MALFORMED_TENSORS"
    TOO_LARGE = "TOO_LARGE"
    CHANGED_WHILE_LOADING = "CHANGED_WHILE_LOADING"
    UNSUPPORTED_METHOD = "UNSUPPORTED_METHOD"
    UNSUPPORTED_TASK = "UNSUPPORTED_TASK"
    UNSUPPORTED_FIELD = "UNSUPPORTED_FIELD"
    INVALID_FIELD = "INVALID_FIELD"
    UNSUPPORTED_DTYPE = "UNSUPPORTED_DTYPE"
    UNKNOWN_SITE = "UNKNOWN_SITE"
    UNSUPPORTED_SITE = "UNSUPPORTED_SITE"
    NO_SITES = "NO_SITES"
    MISSING_TENSOR = "MISSING_TENSOR"
    UNUSED_TENSOR = "UNUSED_TENSOR"
    SHAPE_MISMATCH = "SHAPE_MISMATCH"
    RANK_MISMATCH = "RANK_MISMATCH"
    BASE_WEIGHT_DIFFERS = "BASE_WEIGHT_DIFFERS"
    NOT_FINITE = "NOT_FINITE"
    NOT_SUMMABLE = "NOT_SUMMABLE"
    NOT_MERGEABLE = "NOT_MERGEABLE"
    INVALID_INDICES = "INVALID_INDICES"


class AdapterError(Exception):
    """Base of everything that is wrong with an adapter itself.

    Messages quote foreign files, so what cannot be printed (or encoded) is escaped and the length is bounded.
    """

    def __init__(self, message: str) -> None:
        printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message[:_MAX_MESSAGE])
        super().__init__(printable if len(message) <= _MAX_MESSAGE else printable + "...")


class AdapterInvalid(AdapterError):
    """It exists but cannot be served exactly: bad files, another base, an unhonoured field, an unused tensor."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = str(reason)
        """UPPER_SNAKE_CASE, e.g. UNUSED_TENSOR: the ErrorInfo reason."""


class SourceNotFound(AdapterError):
    """The source does not exist."""


class SourceForbidden(AdapterError):
    """The source lies outside the adapter root or uses a scheme that is not allowed."""
