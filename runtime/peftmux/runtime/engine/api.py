"""The engine's surface: what the server, the client-free `Engine` users and the benchmarks call. Plain values only."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from peftmux.runtime.params import (
    FinishReason,
    Image,
    OutputOptions,
    SamplingParams,
    State,
    StoppingParams,
    TokenLogprob,
    Usage,
)


@dataclass(frozen=True, slots=True)
class WeightedAdapter:
    """One adapter of a weighted sum."""

    adapter: str
    """ "name" or "name@revision"."""
    weight: float


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request. `prompt` holds token ids: text and chat are encoded before (`AsyncEngine.encode*`)."""

    prompt: tuple[int, ...]
    adapter: str = ""
    """ "" is the base model, else "name" or "name@revision"."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stopping: StoppingParams = field(default_factory=StoppingParams)
    output: OutputOptions = field(default_factory=OutputOptions)
    priority: int = 0
    deadline: float | None = None
    """time.monotonic() seconds, or None."""
    stream: bool = True
    """False: one delta at the end, which spares the engine's interpreter a wake-up for every token."""
    task: int | None = None
    """Of a multi-task adapter, and of such only."""
    images: tuple[Image, ...] = ()
    """For an adapter that takes images, in the order of their positions."""
    adapters: tuple[WeightedAdapter, ...] = ()
    """A weighted sum of adapters instead of one."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new since the last one. The first carries prompt_logprobs, the last finish_reason and usage."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    adapter_revision: str = ""
    states: tuple[State, ...] = ()
    """What a request that generates nothing has read, in its one delta."""


@dataclass(frozen=True, slots=True)
class ClassificationRequest:
    """One prompt for an adapter with a classification head."""

    prompt: tuple[int, ...]
    adapter: str
    task: int | None = None
    priority: int = 0
    deadline: float | None = None
    """time.monotonic() seconds, or None."""


@dataclass(frozen=True, slots=True)
class Classification:
    """One row for a sequence head; for a token head one for each token of the request."""

    logits: tuple[State, ...]
    probabilities: tuple[State, ...]
    labels: tuple[str, ...]
    """The likeliest name of each row."""
    names: tuple[str, ...]
    """Of the columns."""
    usage: Usage
    adapter_revision: str = ""


class Pooling(Enum):
    MEAN = "mean"
    LAST = "last"


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """One prompt for its final hidden states, after the last norm, on the base or under an adapter."""

    prompt: tuple[int, ...]
    adapter: str = ""
    pooling: Pooling = Pooling.MEAN
    """Over the request's tokens: virtual ones are left out."""
    normalize: bool = False
    """To length 1."""
    task: int | None = None
    priority: int = 0
    deadline: float | None = None
    """time.monotonic() seconds, or None."""


@dataclass(frozen=True, slots=True)
class Embedding:
    values: State
    usage: Usage
    adapter_revision: str = ""


class AdapterState(Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    UNLOADED = "unloaded"


class ResidencyLevel(Enum):
    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One adapter as `GetAdapter` shows it; the fields are those of peftmux.v1.Adapter."""

    name: str
    state: AdapterState
    revision: str = ""
    kind: str = ""
    residency: ResidencyLevel | None = None
    pinned: bool = False
    min_rank: int = 0
    max_rank: int = 0
    applied_sites: int = 0
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    error: str = ""
    load_seconds: float = 0.0
    requests_in_flight: int = 0
    weight: float = 1.0
    source: str = ""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    name: str
    architecture: str
    vocabulary_size: int
    context_length: int
    dtype: str
    device: str
    parameters: int
    adapter_kinds: tuple[str, ...]
    max_batch_tokens: int
    max_queued_requests: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for metrics and health."""

    running: int
    waiting: int
    kv_cache_usage: float
    """0 .. 1, blocks that no request can take now over all blocks."""
    adapters: Sequence[AdapterInfo]
    running_by_adapter: dict[str, int]
    waiting_by_adapter: dict[str, int]
    healthy: bool


class AsyncEngine(Protocol):
    """Called from one asyncio loop. Errors are those of `peftmux.runtime.errors` and `peftmux.adapters.errors`."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def healthy(self) -> bool:
        """Alive, and not stuck in a step: what `stats` says too, and costs nothing."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        """Yield deltas until the last, which has a finish_reason.

        Raises before the first delta for a request that is refused. Closing the iterator or cancelling the task that
        awaits it frees the row and its cache within one step. Consumed slowly, deltas merge: none is lost.
        """
        ...

    async def classify(self, request: ClassificationRequest) -> Classification:
        """TaskMismatch for an adapter without a head, and the base. Cancelling it frees the row."""
        ...

    async def embed(self, request: EmbeddingRequest) -> Embedding: ...

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids with the tokenizer's special tokens."""
        ...

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """(role, content) pairs through the chat template with the generation prompt. InvalidRequest if it has none."""
        ...

    def encode_around(self, text: str | Sequence[tuple[str, str]], marker: str) -> tuple[tuple[int, ...], ...]:
        """A text's or a chat's tokens, as above, in the pieces between `marker`, which is no part of them."""
        ...

    def pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The tokenizer's own piece for each id."""
        ...

    async def load_adapter(
        self,
        name: str,
        source: str,
        *,
        revision: str = "",
        pinned: bool = False,
        wait: bool = True,
        replace: bool = False,
    ) -> AdapterInfo: ...

    async def unload_adapter(self, name: str, *, wait: bool = True) -> AdapterInfo: ...

    async def update_adapter(
        self, name: str, *, pinned: bool | None = None, weight: float | None = None
    ) -> AdapterInfo:
        """Change what is not None. The weight is a positive share in fair scheduling, of requests that come later."""
        ...

    def watch_adapters(self) -> AsyncIterator[AdapterInfo]:
        """Every adapter as it is, then each change, until it is closed. Draining when the engine leaves."""
        ...

    def get_adapter(self, name: str) -> AdapterInfo: ...

    def list_adapters(self) -> tuple[AdapterInfo, ...]: ...

    def stats(self) -> EngineStats: ...

    async def drain(self, grace_seconds: float) -> None:
        """Refuse new requests, let running ones finish within the grace, fail the rest with Draining, then stop."""
        ...
