"""The values that cross between scheduler, runner and engine: one frozen plan down, one frozen result up."""

from __future__ import annotations

from dataclasses import dataclass

from peftmux.runtime.params import ImagePatches, OutputOptions, Readout, SamplingParams, State, TokenLogprob
from peftmux.runtime.scheduler.history import History


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Neighbouring tokens that are images: cache positions start .. stop - 1, pseudo-ids -1 in the row's tokens.

    They are computed in one step: each sees all of them where the adapter's attention goes both ways.
    """

    start: int
    stop: int
    images: tuple[ImagePatches, ...]
    both_ways: bool


@dataclass(frozen=True, slots=True)
class RowPlan:
    """The work of one request in one step.

    A row is the request's leading virtual tokens (negative pseudo-ids, -1 .. -n), then its prompt, which may hold
    virtual tokens of its own (again from -1 on), then what it generated.
    `start` counts cache positions from the row's first virtual token; `start + position_offset` is the position id.
    """

    row: int
    """The request's id in the engine."""
    slot: int
    """Device slot of the adapter revision; 0 is the base model."""
    tokens: tuple[int, ...]
    """The tokens to compute now; len 1 for decode."""
    start: int
    position_offset: int
    blocks: tuple[int, ...]
    """The cache blocks that hold positions 0 .. start + len(tokens) - 1, in order."""
    samples: bool
    """The last of `tokens` yields a new token."""
    generated: int
    """Tokens generated before this step: the index that seeds the draw."""
    sampling: SamplingParams
    output: OutputOptions
    prompt_logprobs_from: int
    """With output.prompt_logprobs: rows of `tokens` from this index on predict prompt tokens; else len(tokens)."""
    next_tokens: tuple[int, ...]
    """The prompt tokens that those rows predict, in order (the last may be absent at the prompt's end).

    A virtual token predicts nothing and nothing predicts one: such an entry of the result has no logprob.
    """
    suppressed: tuple[int, ...]
    """Token ids that may not be drawn yet (end tokens before min_tokens)."""
    history: History | None
    """Of a row with penalties; the row adds to it when this step's token is known."""
    active_from: int = 0
    """Cache position from which the slot's adapter applies; before it the base model runs."""
    readout: Readout | None = None
    """Of a row that never samples."""
    read_from: int = 0
    """With `readout`: the first of `tokens` whose final hidden state is read; len(tokens) where none is."""
    images: tuple[ImageSpan, ...] = ()
    """Of which `tokens` has any."""
    awaits: bool = False
    """The last of `tokens` is not known yet: it is what this row draws in the step that was launched last."""

    @property
    def reads(self) -> tuple[int, ...]:
        """Indices of the tokens whose hidden states are read. Of every token means: of every real one."""
        if self.readout is None:
            return ()
        indices = range(self.read_from, len(self.tokens))
        if not self.readout.of_every_token:
            return tuple(indices)
        return tuple([i for i in indices if self.tokens[i] >= 0])

    @property
    def num_states(self) -> int:
        """How many states the step's result has for this row."""
        reads = len(self.reads)
        return min(reads, 1) if self.readout is Readout.MEAN else reads


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Decode rows first, then prefill chunks; inside each, rows of the same slot are adjacent."""

    rows: tuple[RowPlan, ...]
    copies: tuple[tuple[int, int], ...] = ()
    """Cache blocks to copy (source, destination) before anything is computed."""

    @property
    def num_tokens(self) -> int:
        return sum(len(r.tokens) for r in self.rows)

    @property
    def is_foreseeable(self) -> bool:
        """The step after this one can be planned, and run, before the result of this one is there.

        A row with penalties needs its tokens themselves. What a readout or a report of the prompt gives is taken while
        the row's adapter is sure to be there.
        """
        return all(row.history is None and row.readout is None and not row.next_tokens for row in self.rows)


@dataclass(frozen=True, slots=True)
class RowResult:
    row: int
    token: int | None
    """None where the row's prefill goes on, and in rows with a readout."""
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt tokens named in next_tokens."""
    states: tuple[State, ...] = ()
    """What the readout gives of this step's tokens: logits of each, the last one's state, or one sum of states."""

    def answers(self, plan: RowPlan) -> bool:
        """False: something that the plan asked for is missing, because the row's values were not finite.

        The scheduler takes such a row no further; the engine ends it.
        """
        missing = plan.samples and self.token is None
        if plan.readout is not None:
            return len(self.states) == plan.num_states
        return not missing and len(self.prompt_logprobs) == len(plan.next_tokens)


@dataclass(frozen=True, slots=True)
class StepResult:
    rows: tuple[RowResult, ...]
    """In the plan's order."""
