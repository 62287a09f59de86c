"""Every error the runtime answers a request with. The server maps each class to a status; a test proves it is total.

    RuntimeFailure
    |-- InvalidRequest          a field of the request is bad
    |-- AdapterNotFound         no adapter of that name (or revision)
    |-- AdapterExists           the name is taken by other content
    |-- AdapterLoading          its first load is under way          (retry)
    |-- TaskMismatch            the adapter cannot do what is asked of it (it classifies, or it generates)
    |-- Draining                the server or the adapter is going   (retry)
    |-- QueueFull               too many requests wait               (retry)
    |-- AdapterMemoryExhausted  other adapters hold all of it        (retry)
    |-- DeadlineExceeded        the deadline has passed or cannot be met
    |-- UnsupportedModel        the base model cannot be served exactly (at start only)
    |-- NotFinite               the model's logits for this row were NaN or infinite
    |-- StepFailed              the step that this row was in failed, or the server at this row alone
    `-- EngineDead              the engine's thread failed; the process should be replaced
and `peftmux.adapters.errors.AdapterError` for what is wrong with an adapter itself.
"""

from __future__ import annotations


class RuntimeFailure(Exception):
    """Base of the tree above. `retry_after` is seconds, where trying again can help."""

    retry_after: float | None = None


class InvalidRequest(RuntimeFailure):
    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        """Path of the field in the request message, e.g. "sampling.top_p"."""


class AdapterNotFound(RuntimeFailure):
    pass


class AdapterExists(RuntimeFailure):
    pass


class AdapterLoading(RuntimeFailure):
    retry_after = 0.5


class TaskMismatch(RuntimeFailure):
    pass


class Draining(RuntimeFailure):
    retry_after = 1.0


class QueueFull(RuntimeFailure):
    retry_after = 0.5


class AdapterMemoryExhausted(RuntimeFailure):
    retry_after = 1.0


class DeadlineExceeded(RuntimeFailure):
    pass


class UnsupportedModel(RuntimeFailure):
    pass


class NotFinite(RuntimeFailure):
    pass


class StepFailed(RuntimeFailure):
    pass


class EngineDead(RuntimeFailure):
    pass
