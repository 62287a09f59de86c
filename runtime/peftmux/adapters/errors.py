"""Why an adapter cannot be served. Messages say what was expected and what was found."""

from __future__ import annotations


class AdapterError(Exception):
    """Base of everything that is wrong with an adapter itself."""


class AdapterInvalid(AdapterError):
    """It exists but cannot be served exactly: bad files, another base, an unhonoured field, an unused tensor."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        """UPPER_SNAKE_CASE, e.g. UNUSED_TENSOR: the ErrorInfo reason."""


class SourceNotFound(AdapterError):
    """The source does not exist."""


class SourceForbidden(AdapterError):
    """The source lies outside the adapter root or uses a scheme that is not allowed."""
