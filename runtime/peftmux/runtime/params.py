"""What a request asks for, as plain values. No torch, no protobuf: scheduler, model, engine and server share these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class Readout(Enum):
    """What a row that generates nothing gives of its final hidden states."""

    SEQUENCE = "sequence"
    """The adapter's head on the last token."""
    TOKENS = "tokens"
    """The adapter's head on every token."""
    LAST = "last"
    """The last token's state."""
    MEAN = "mean"
    """The sum of all tokens' states, to be divided by their number."""

    @property
    def of_every_token(self) -> bool:
        return self in (Readout.TOKENS, Readout.MEAN)


State = tuple[float, ...]
"""A hidden state, or the logits of a head on one."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Temperature 0 is greedy. `seed` is always set here: the engine draws one where the caller did not."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoppingParams:
    """`max_tokens` None fills the context."""

    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """Alternatives per token: None is no log-probabilities at all, 0 the chosen token's only."""

    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithm under the model's distribution, before temperature and penalties."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ImagePatches:
    """An image cut into a grid of patches, row by row, as its adapter's patch embedding takes them."""

    rows: int
    columns: int
    values: bytes
    """float32, little-endian: of each patch [3 channels, height, width]."""


@dataclass(frozen=True, slots=True)
class Image:
    """What stands before token `position` of the prompt: patches, or a file (PNG, JPEG, ...) to be made into some."""

    position: int
    content: ImagePatches | bytes
