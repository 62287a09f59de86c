"""A model small enough to reason about, over a real block table: what it answers depends on every cached position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from zlib import crc32

import pytest

from peftmux.runtime.params import OutputOptions, Readout, SamplingParams, TokenLogprob
from peftmux.runtime.scheduler import NewRow, PrefixBlocks, RowPlan, RowResult, Scheduler, StepPlan, StepResult

VOCABULARY = 97


def _cell(salt: bytes, token: int, position: int) -> int:
    """What the model keeps for one token: depends on the adapter, the token and its position id."""
    return crc32(repr((salt, token, position)).encode())


def _next_token(slot: int, cells: Sequence[int]) -> int:
    return crc32(repr((slot, *cells)).encode()) % VOCABULARY


class Serving:
    """A scheduler with the fake model behind it. `outputs`, `reported` and `states` collect what a client would see.

    The hidden state of a token is the token that would follow it.
    """

    def __init__(self, num_blocks: int = 64, block_size: int = 4, **options: int) -> None:
        self.scheduler = Scheduler(num_blocks, block_size, **options)  # type: ignore[arg-type]
        self.cells: dict[tuple[int, int], int] = {}
        """(block, offset) -> content; never cleared, so that a wrong table reads something stale."""
        self.rows: dict[int, NewRow] = {}
        self.outputs: dict[int, list[int]] = {}
        self.reported: dict[int, list[int]] = {}
        self.states: dict[int, list[float]] = {}
        self.finished: set[int] = set()
        self.aborted: set[int] = set()

    def row(self, id: int, prompt: Sequence[int], new_tokens: int = 5, **fields: object) -> NewRow:
        prefix = fields.get("prefix")
        virtual = prefix.length if isinstance(prefix, PrefixBlocks) else int(fields.get("virtual_tokens", 0))  # type: ignore[call-overload]
        settings: dict[str, object] = {"slot": 0, "sampling": SamplingParams(), "output": OutputOptions(), **fields}
        return NewRow(id, prompt=tuple(prompt), max_total=virtual + len(prompt) + new_tokens, **settings)  # type: ignore[arg-type]

    def add(self, id: int, prompt: Sequence[int], new_tokens: int = 5, **fields: object) -> None:
        new = self.row(id, prompt, new_tokens, **fields)
        self.scheduler.add(new)
        self.rows[id], self.outputs[id], self.reported[id], self.states[id] = new, [], [], []

    def load_prefix(self, length: int, salt: bytes) -> PrefixBlocks:
        prefix = self.scheduler.allocate_prefix(length, salt.decode())
        for position in range(length):
            block = prefix.blocks[position // self.scheduler.block_size]
            self.cells[block, position % self.scheduler.block_size] = _cell(salt, -1 - position, position)
        return prefix

    def step(self, fails: Callable[[int], bool] = lambda row: False) -> StepPlan | None:
        """One step, checked: plan, compute, update, finish the rows that have all of their tokens."""
        plan = self.scheduler.plan()
        self.scheduler.check()
        if plan is None:
            return None
        for source, target in plan.copies:
            for offset in range(self.scheduler.block_size):
                if (source, offset) in self.cells:
                    self.cells[target, offset] = self.cells[source, offset]
        self._prove_disjoint_writes(plan)
        results = tuple(self._compute(row, fails(row.row)) for row in plan.rows)
        for got in self.scheduler.update(StepResult(results)):
            self._publish(got)
        self.scheduler.check()
        return plan

    def run(self, steps: int = 2000) -> int:
        """Steps until nothing is left."""
        for count in range(steps):
            if self.step() is None:
                return count
        raise AssertionError(f"rows are left after {steps} steps")

    def abort(self, id: int) -> None:
        assert id in self.scheduler._rows
        self.scheduler.abort(id)
        self.finished.add(id)
        self.aborted.add(id)

    def expected(self, id: int, count: int) -> list[int]:
        """The first `count` tokens of the row, by the model's definition: no batch, no cache."""
        new = self.rows[id]
        tokens = [*range(-1, -new.num_virtual - 1, -1), *new.prompt]
        for _ in range(count):
            tokens.append(_next_token(new.slot, [_cell(new.salt, t, p) for p, t in enumerate(tokens)]))
        return tokens[len(tokens) - count :]

    def expected_states(self, id: int) -> list[float]:
        """What the row's readout gives when it is done, MEAN's sum as one number."""
        new = self.rows[id]
        tokens = [*range(-1, -new.num_virtual - 1, -1), *new.prompt]
        cells = [_cell(new.salt, t, p) for p, t in enumerate(tokens)]
        each = [float(_next_token(new.slot, cells[: p + 1])) for p in range(new.num_virtual, len(tokens))]
        if new.readout is Readout.MEAN:
            return [sum(each)]
        return each if new.readout is Readout.TOKENS else each[-1:]

    def _prove_disjoint_writes(self, plan: StepPlan) -> None:
        size, written = self.scheduler.block_size, [target for _, target in plan.copies]
        for row in plan.rows:
            assert len(row.blocks) == -(-(row.start + len(row.tokens)) // size)
            assert 0 not in row.blocks
            first = row.start // size
            copied = [t for _, t in plan.copies if t in row.blocks]
            written += [b for b in row.blocks[first:] if b not in copied]
        assert len(set(written)) == len(written), "two rows write into one block"

    def _compute(self, row: RowPlan, fails: bool) -> RowResult:
        new, size = self.rows[row.row], self.scheduler.block_size
        for position, token in enumerate(row.tokens, row.start):
            self.cells[row.blocks[position // size], position % size] = _cell(new.salt, token, position)
        end = row.start + len(row.tokens)
        cells = [self.cells[row.blocks[p // size], p % size] for p in range(end)]
        sampled = _next_token(row.slot, cells) if row.samples and not fails else None
        values = [float(_next_token(row.slot, cells[: row.start + i + 1])) for i in row.reads]
        if row.readout is Readout.MEAN and values:
            values = [sum(values)]
        states = () if fails else tuple((value,) for value in values)
        return RowResult(row.row, sampled, None, tuple(TokenLogprob(t, -1.0) for t in row.next_tokens), states)

    def _publish(self, got: RowResult) -> None:
        self.reported[got.row] += [entry.token_id for entry in got.prompt_logprobs]
        out, new = self.outputs[got.row], self.rows[got.row]
        if new.readout is not None:
            self._read(got, new.readout)
        if got.token is None:
            return
        out.append(got.token)
        if new.num_virtual + len(new.prompt) + len(out) == new.max_total:
            self.scheduler.finish(got.row)
            self.finished.add(got.row)

    def _read(self, got: RowResult, readout: Readout) -> None:
        assert got.token is None, "a row with a readout has drawn a token"
        self.states[got.row] += [value for (value,) in got.states]
        if readout is Readout.MEAN:
            self.states[got.row] = [sum(self.states[got.row])]
        if self.scheduler.is_read_out(got.row):
            self.scheduler.finish(got.row)
            self.finished.add(got.row)


class RunningAhead(Serving):
    """The same, each step computed before the result of the one before it is taken in, and rows that end by surprise.

    `endings`: tokens that end a row, as an end token does: the scheduler hears of it when the row's next step is done.
    """

    def __init__(self, *args: int, endings: int = 0, **options: int) -> None:
        super().__init__(*args, **options)
        self.endings = endings
        self.wasted = 0
        """Rows of steps that were computed for nothing."""
        self._drawn: dict[int, int] = {}
        self._behind: tuple[StepPlan, tuple[RowResult, ...], dict[int, bool]] | None = None

    def step(self, fails: Callable[[int], bool] = lambda row: False) -> StepPlan | None:
        plan = self.scheduler.plan()
        self.scheduler.check()
        before, self._behind = self._behind, None
        launched = None if plan is None else self._launch(plan, fails)
        if before is not None:
            self._take(*before)
        if plan is not None and launched is not None:
            if plan.is_foreseeable:
                self.scheduler.assume()
                self._behind = (plan, *launched)
            else:
                self._take(plan, *launched)
        self.scheduler.check()
        return plan or (before and before[0])

    def _launch(self, plan: StepPlan, fails: Callable[[int], bool]) -> tuple[tuple[RowResult, ...], dict[int, bool]]:
        for source, target in plan.copies:
            for offset in range(self.scheduler.block_size):
                if (source, offset) in self.cells:
                    self.cells[target, offset] = self.cells[source, offset]
        self._prove_disjoint_writes(plan)
        known = [replace(r, tokens=(*r.tokens[:-1], self._drawn[r.row])) if r.awaits else r for r in plan.rows]
        results = tuple(self._compute(row, False) for row in known)
        self._drawn = {got.row: got.token for got in results if got.token is not None}
        return results, {row.row: fails(row.row) for row in plan.rows}

    def _take(self, plan: StepPlan, results: tuple[RowResult, ...], failed: dict[int, bool]) -> None:
        self.wasted += sum(row.row in self.finished for row in plan.rows)
        for row in plan.rows:
            if failed[row.row] and row.row not in self.finished:
                self.abort(row.row)
        for got in self.scheduler.update(StepResult(results)):
            self._publish(got)
            if got.row not in self.finished and got.token is not None and got.token < self.endings:
                self.scheduler.finish(got.row)
                self.finished.add(got.row)


@pytest.fixture(scope="session")
def running_ahead() -> type[RunningAhead]:
    return RunningAhead


@pytest.fixture(scope="session")
def serving() -> type[Serving]:
    return Serving
