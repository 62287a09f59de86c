"""A request while it runs: what it has produced, and when it is over. Owned by the engine's thread."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from peftmux.runtime.engine.api import Delta, GenerationRequest
from peftmux.runtime.engine.placement import Placed
from peftmux.runtime.errors import RuntimeFailure
from peftmux.runtime.params import FinishReason, Readout, State, TokenLogprob, Usage
from peftmux.runtime.residency.store import Revision
from peftmux.runtime.scheduler.plan import ImageSpan, RowResult

Outcome = Delta | RuntimeFailure
Sink = Callable[[Outcome], None]


class TextStream(Protocol):
    """The detokeniser's surface."""

    def push(self, token_ids: tuple[int, ...]) -> tuple[str, bool]: ...

    def finish(self) -> str: ...


class NoText:
    """For models without a tokenizer."""

    def push(self, token_ids: tuple[int, ...]) -> tuple[str, bool]:
        return "", False

    def finish(self) -> str:
        return ""


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """`sink` receives its deltas and then nothing, or one failure; called in the thread that delivers."""

    id: int
    request: GenerationRequest
    tokens: tuple[int, ...]
    """The prompt with its adapter's virtual tokens, below zero, where they stand among the real ones."""
    revision: Revision[Placed] | None
    """Leased until the request ends; None for the base model."""
    text: TextStream
    ends: frozenset[int]
    """Tokens that end it, stop tokens and (unless ignored) end tokens."""
    max_tokens: int
    sink: Sink
    readout: Readout | None = None
    """Set: it generates nothing, and gives its states in the one delta it has."""
    images: tuple[ImageSpan, ...] = ()
    """Where the request's prompt has them."""
    images_digest: bytes = b""
    """Names what they show."""
    weight: float = 1.0
    """Its adapter's share in fair scheduling."""
    submitted: float = field(default_factory=time.monotonic)
    scheduled: float | None = None
    last_token: float | None = None
    cached_tokens: int = 0
    generated: int = 0
    _ids: list[int] = field(default_factory=list)
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    _prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    _text: list[str] = field(default_factory=list)
    _states: list[State] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.request.output.prompt_logprobs is not None and self.tokens[0] >= 0:
            self._prompt_logprobs.append(TokenLogprob(self.request.prompt[0], None))  # nothing predicts the first

    @property
    def adapter(self) -> str:
        return self.revision.name if self.revision else ""

    def accept(self, result: RowResult) -> FinishReason | None:
        """Take in what a step gave this row; the reason if that ended it."""
        self._prompt_logprobs += [entry for entry in result.prompt_logprobs if entry.token_id >= 0]
        self._read(result.states)
        token = result.token
        if token is None:
            return None
        self.generated += 1
        self._ids.append(token)
        if result.logprob is not None:
            self._logprobs.append(result.logprob)
        text, stopped = self.text.push((token,))
        if text:
            self._text.append(text)
        if stopped or token in self.ends:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.generated >= self.max_tokens else None

    def _read(self, states: tuple[State, ...]) -> None:
        """Chunks of one prompt come one after the other: their sums are summed, in float64."""
        if self.readout is Readout.MEAN and self._states and states:
            states = (tuple(map(operator.add, self._states.pop(), states[0])),)
        self._states += states

    @property
    def has_news(self) -> bool:
        return bool(self._ids)

    def take(self, finish: FinishReason | None = None) -> Delta:
        """What is new since the last call; with `finish` the last one."""
        usage = None
        if finish is not None:
            self._text.append(self.text.finish())
            usage = Usage(len(self.request.prompt), self.generated, self.cached_tokens)
        delta = Delta(
            text="".join(self._text),
            token_ids=tuple(self._ids),
            logprobs=tuple(self._logprobs),
            prompt_logprobs=tuple(self._prompt_logprobs),
            finish_reason=finish,
            usage=usage,
            adapter_revision=self.revision.digest if self.revision else "",
            states=tuple(self._states),
        )
        self._ids, self._logprobs, self._prompt_logprobs, self._text = [], [], [], []
        return delta
