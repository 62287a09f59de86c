"""What the clients take and return. Plain values: no gRPC, no protobuf, nothing of the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias, TypedDict


class FinishReason(Enum):
    STOP = "stop"
    """An end token or a stop string."""
    LENGTH = "length"
    CANCELLED = "cancelled"


class AdapterState(Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    UNLOADED = "unloaded"


class Pooling(Enum):
    MEAN = "mean"
    """Over the prompt's tokens."""
    LAST = "last"


class Residency(Enum):
    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


Prompt: TypeAlias = str | Sequence[int] | Sequence[ChatMessage]
"""A text, token ids taken as they are, or a conversation for the tokenizer's chat template."""


PlainPrompt: TypeAlias = str | Sequence[int]
"""A text, or token ids taken as they are."""


@dataclass(frozen=True, slots=True)
class Image:
    """For an adapter that takes images: the bytes of a file (PNG, JPEG, ...), or a grid of patches."""

    data: bytes
    """With `rows` and `columns`: float32, little-endian, of each patch [3 channels, height, width], row by row."""
    rows: int = 0
    columns: int = 0
    position: int | None = None
    """The index of the prompt's token that it stands before; None: at the text's next "<image>", or in front."""


class GenerateOptions(TypedDict, total=False):
    """Everything of a request beside its prompt. What is left out is the server's default; see inference.proto."""

    adapter: str
    """ "" or left out is the base model; "name" or "name@revision"."""
    adapters: Sequence[tuple[str, float]]
    """A weighted sum of adapters instead of one: (name or name@revision, weight) of each."""
    adapter_task: int
    """Which task of a multi-task adapter."""
    temperature: float
    """Left out is 1; 0 is greedy."""
    top_p: float
    top_k: int
    min_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    max_tokens: int
    """Left out fills the context."""
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    """Alternatives per generated token; 0 is the chosen token's log-probability only."""
    prompt_logprobs: int
    priority: int
    images: Sequence[Image]
    """For an adapter that takes them, in the prompt's order."""
    timeout: float
    """Seconds for the whole call, retries included, instead of the client's own."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithm under the model's distribution, before temperature and penalties."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob) of the alternatives asked for."""


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    adapter_revision: str = ""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is new in a stream. The first carries prompt_logprobs, the last finish_reason and usage."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    adapter_revision: str = ""


@dataclass(frozen=True, slots=True)
class ClassRow:
    """What a head says of a sequence, or of one token."""

    logits: tuple[float, ...]
    probabilities: tuple[float, ...]
    label: str
    """The likeliest."""


@dataclass(frozen=True, slots=True)
class Classification:
    """One row for a sequence head, one for each token of the prompt for a token head."""

    rows: tuple[ClassRow, ...]
    labels: tuple[str, ...]
    """The names of the logits."""
    usage: Usage
    adapter_revision: str = ""


@dataclass(frozen=True, slots=True)
class Embedding:
    values: tuple[float, ...]
    usage: Usage
    adapter_revision: str = ""


@dataclass(frozen=True, slots=True)
class Tokens:
    token_ids: tuple[int, ...]
    pieces: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """The base model of the server."""

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
class Adapter:
    """One adapter on the server; the fields are those of peftmux.v1.Adapter."""

    name: str
    revision: str
    kind: str
    state: AdapterState | None
    residency: Residency | None
    pinned: bool
    min_rank: int
    max_rank: int
    applied_sites: int
    tensors: int
    parameters: int
    bytes: int
    error: str
    load_seconds: float
    requests_in_flight: int
    weight: float
    source: str
