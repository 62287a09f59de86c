"""One request inside the scheduler: what it asked for, and how far the cache has caught up with its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peftmux.runtime.params import OutputOptions, Readout, SamplingParams
from peftmux.runtime.scheduler.history import History
from peftmux.runtime.scheduler.keys import BlockKey, block_key, root_digest
from peftmux.runtime.scheduler.plan import ImageSpan, RowPlan

_UNKNOWN = 0
"""Stands in a row's tokens for one that is not known yet: a token like any other, for a moment."""


@dataclass(frozen=True, slots=True)
class PrefixBlocks:
    """Cache blocks that hold an adapter's prefix: positions 0 .. length - 1. Written once, by the engine."""

    owner: str
    length: int
    shared: tuple[int, ...]
    """Full blocks, at the head of the block table of every row of the adapter."""
    tail: int | None
    """The last block where `length` is not a multiple of the block size: copied into each row's first own block."""

    @property
    def blocks(self) -> tuple[int, ...]:
        return self.shared if self.tail is None else (*self.shared, self.tail)


@dataclass(frozen=True, slots=True)
class NewRow:
    """A request as the engine hands it over. Ids are the engine's, unique for its life."""

    id: int
    slot: int
    """Device slot of the adapter revision; 0 is the base model."""
    prompt: tuple[int, ...]
    """With negative pseudo-ids where virtual tokens stand among the real ones."""
    max_total: int
    """The most tokens the row may come to hold: virtual, prompt and generated. The engine finishes it there."""
    sampling: SamplingParams
    output: OutputOptions
    salt: bytes = b""
    """Names everything besides tokens that changes keys and values (the adapter's digest); b"" where nothing does."""
    prefix: PrefixBlocks | None = None
    virtual_tokens: int = 0
    """Leading virtual tokens to compute (negative pseudo-ids), where there is no prefix."""
    inner_virtual: int = 0
    """How many tokens of the prompt are virtual, or of images."""
    position_offset: int = 0
    min_tokens: int = 0
    end_token_ids: tuple[int, ...] = ()
    """May not be drawn before `min_tokens` are generated."""
    priority: int = 0
    fairness_key: str = ""
    weight: float = 1.0
    """Share of service that its fairness key gets beside others'."""
    arrival: float = 0.0
    """Seconds on any one clock; earlier goes first inside a fairness key."""
    active_from: int = 0
    """Cache position from which the slot's adapter applies; the salt names it too, since it changes the cache."""
    readout: Readout | None = None
    """Set: the row generates nothing, and ends when its last token is computed."""
    images: tuple[ImageSpan, ...] = ()
    """Ascending; the salt names what they show, since their tokens do not."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError(f"row {self.id}: expected at least one prompt token, got none")
        if self.weight <= 0:
            raise ValueError(f"row {self.id}: expected a positive weight, got {self.weight}")
        if self.virtual_tokens and self.prefix:
            raise ValueError(f"row {self.id}: expected virtual tokens or a prefix, got both")
        if (self.virtual_tokens or self.inner_virtual or self.prefix) and not self.salt:
            raise ValueError(f"row {self.id}: expected a salt beside virtual tokens or a prefix, got none")
        if self.max_total <= self.num_virtual + len(self.prompt):
            raise ValueError(
                f"row {self.id}: expected max_total above its {self.num_virtual} virtual and {len(self.prompt)} "
                f"prompt tokens, got {self.max_total}"
            )

    @property
    def num_virtual(self) -> int:
        return self.prefix.length if self.prefix else self.virtual_tokens


class Row:
    """The mutable state of a row. Owned by the scheduler: nothing else changes it.

    Invariants while it runs: `blocks` cover all of `tokens` but a newly drawn last one; positions below `num_computed`
    are in the cache. While it waits: `blocks` is empty and `num_computed` is 0.
    """

    __slots__ = (
        "_block_size",
        "_keys",
        "_root",
        "_table",
        "awaited",
        "blocks",
        "cached_tokens",
        "copy",
        "history",
        "new",
        "next_reported",
        "num_computed",
        "num_registered",
        "num_virtual",
        "order",
        "prompt_end",
        "tokens",
    )

    def __init__(self, new: NewRow, block_size: int) -> None:
        self.new = new
        self.num_virtual = new.num_virtual
        self.prompt_end = self.num_virtual + len(new.prompt)
        self.tokens: list[int] = [*range(-1, -self.num_virtual - 1, -1), *new.prompt]
        self.num_computed = 0
        self.awaited: int | None = None
        """Where in `tokens` the last one stands for what a step that has been launched draws; None: all are known."""
        self.blocks: list[int] = []
        self.num_registered = 0
        self.copy: tuple[int, int] | None = None
        """Prefix tail to copy before the first chunk; kept until the step that carried it has come back."""
        self.order: tuple[int, int] | None = None
        """(-priority, number of first admission); set once, so that a preempted row keeps its seniority."""
        self.cached_tokens = 0
        self.next_reported = self._first_reported()
        """The first position whose prediction of a prompt token, or hidden state, has not been reported."""
        sampling = new.sampling
        wanted = sampling.repetition_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty
        self.history = History(token for token in new.prompt if token >= 0) if wanted else None
        """For the penalties of a row that has any."""
        self._block_size = block_size
        self._root = root_digest(new.salt, new.position_offset)
        self._keys: list[BlockKey] = []
        self._table: tuple[int, ...] = ()

    def _first_reported(self) -> int:
        if self.new.readout is not None:
            return self.num_virtual if self.new.readout.of_every_token else self.prompt_end - 1
        return self.num_virtual if self.new.output.prompt_logprobs is not None else self.prompt_end

    @property
    def num_shared(self) -> int:
        """Blocks at the head of the table that belong to the prefix."""
        return len(self.new.prefix.shared) if self.new.prefix else 0

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def is_full(self) -> bool:
        """It has all the tokens that it may have: the last one is never computed."""
        return len(self.tokens) >= self.new.max_total

    @property
    def is_reporting(self) -> bool:
        """Log-probabilities of prompt tokens are still to come. The last prompt token predicts none of them."""
        return self.new.readout is None and self.next_reported < self.prompt_end - 1

    @property
    def is_read_out(self) -> bool:
        return self.new.readout is not None and self.num_computed == len(self.tokens)

    @property
    def num_readable(self) -> int:
        """Leading tokens that need not be computed if the cache has them: nobody wants their logits or states."""
        if self.is_reporting or self.new.readout is not None:
            return self.next_reported
        return len(self.tokens) - 1

    def keys(self, start: int, stop: int) -> Sequence[BlockKey]:
        """Keys of the full blocks start .. stop - 1, computed once: tokens never change."""
        size = self._block_size
        for i in range(len(self._keys), stop):
            parent = self._keys[i - 1].digest if i else self._root
            self._keys.append(block_key(parent, self.tokens[i * size : (i + 1) * size]))
        return self._keys[start:stop]

    def place(self, blocks: list[int], num_computed: int, num_registered: int, copy: tuple[int, int] | None) -> None:
        """The row has been given blocks for all of its tokens."""
        self.blocks = blocks
        self.num_computed = num_computed
        self.num_registered = num_registered
        self.copy = copy
        self._table = ()

    def chunk(self, budget: int, whole: bool) -> int:
        """How many tokens to compute next: at most `budget`, but no span of images is cut.

        `whole`: a span that begins the chunk is computed even where it alone is more than the budget.
        """
        end = self.num_computed + min(self.pending, budget)
        for span in self.new.images:
            if span.start < end < span.stop:
                begins = span.start <= self.num_computed
                end = (span.stop if whole else self.num_computed) if begins else span.start
        return end - self.num_computed

    def plan(self, count: int) -> RowPlan:
        """The next `count` tokens as work for the runner."""
        new, tokens, start = self.new, self.tokens, self.num_computed
        end = start + count
        report, predicted = self._reporting(start, end) if self.is_reporting else (count, ())
        return RowPlan(
            new.id,
            new.slot,
            (tokens[-1],) if start == len(tokens) - 1 else tuple(tokens[start:end]),
            start,
            new.position_offset,
            self._blocks_until(end),
            end == len(tokens) and new.readout is None,
            len(tokens) - self.prompt_end,
            new.sampling,
            new.output,
            report,
            predicted,
            new.end_token_ids if len(tokens) - self.prompt_end < new.min_tokens else (),
            self.history,
            new.active_from,
            new.readout,
            count if new.readout is None else min(max(self.next_reported - start, 0), count),
            tuple([span for span in new.images if span.start < end and start < span.stop]) if new.images else (),
            self.awaited is not None and end == len(tokens),
        )

    def draw(self, token: int | None) -> None:
        """One more token; None is one that is not known yet, and that `learn` says later."""
        if token is None:
            assert self.history is None, f"row {self.new.id} has penalties, which need every token"
            self.awaited = len(self.tokens)
        elif self.history is not None:
            self.history.add(token)
        self.tokens.append(_UNKNOWN if token is None else token)

    def learn(self, token: int) -> None:
        """What `draw` did not know."""
        assert self.awaited is not None, f"row {self.new.id} awaits no token"
        self.tokens[self.awaited], self.awaited = token, None

    def num_counted(self, stop: int) -> int:
        """How many of the first `stop` tokens are not virtual; those of images are the request's own."""
        if not self.new.inner_virtual:
            return max(0, stop - self.num_virtual)
        seen = sum(min(span.stop, stop) - span.start for span in self.new.images if span.start < stop)
        return sum(token >= 0 for token in self.tokens[self.num_virtual : stop]) + seen

    def _blocks_until(self, end: int) -> tuple[int, ...]:
        """The table is rebuilt only when it grows: a decode row keeps one tuple for block_size steps."""
        count = -(-end // self._block_size)
        if len(self._table) != count:
            self._table = tuple(self.blocks[:count])
        return self._table

    def _reporting(self, start: int, end: int) -> tuple[int, tuple[int, ...]]:
        first = max(start, self.next_reported)
        predicted = tuple(self.tokens[first + 1 : min(end, self.prompt_end - 1) + 1])
        return (first - start, predicted) if predicted else (end - start, ())
