"""Which tokens run next. One rule: a row's `num_computed` catches up with its tokens.

Chunked prefill, cache hits and resumption after preemption are that rule with different starting points. A step holds
one token of every row that decodes, then prefill chunks, then newly admitted rows, under a token budget. Images are
never cut: one that is more than the budget takes a step of its own, beside the rows that decode.

Blocks: an admitted row gets blocks for all tokens it has, and one more each time it outgrows them. When none is free
the row of lowest priority, last admitted among equals, loses its blocks and is computed again later (its blocks stay
findable in the cache until overwritten). No row starves: the most senior running row is never preempted by another,
every row fits alone (`add` refuses others), and a preempted row keeps its seniority.

Called from one thread (counts and `usage` may be read from others). Everything but `update` is called between steps:
after `update`, or instead of it where the step failed; `plan` then returns the same work again for rows still there.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from dataclasses import dataclass

from peftmux.runtime.errors import AdapterMemoryExhausted, InvalidRequest
from peftmux.runtime.scheduler.blocks import BlockPool, IntegrityError
from peftmux.runtime.scheduler.fairness import GENERATED_TOKEN_COST, PROMPT_TOKEN_COST, FairQueue
from peftmux.runtime.scheduler.plan import RowPlan, RowResult, StepPlan, StepResult
from peftmux.runtime.scheduler.row import NewRow, PrefixBlocks, Row


@dataclass(slots=True)
class _HeldPrefix:
    """Its blocks are freed when the adapter has let go and the last row that uses them has ended."""

    prefix: PrefixBlocks
    users: int = 0
    let_go: bool = False


def _prefills(chosen: list[tuple[Row, int]]) -> bool:
    return bool(chosen) and chosen[-1][1] > 1


def _seniority(row: Row) -> tuple[int, int]:
    assert row.order is not None
    return row.order


class Scheduler:
    """`max_rows` rows run at most, and never more than `max_batch_tokens`, so that each can decode in each step."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        max_batch_tokens: int = 512,
        max_rows: int = 256,
        prefix_caching: bool = True,
    ) -> None:
        if max_batch_tokens < 1 or max_rows < 1:
            raise ValueError(f"expected at least 1 token and 1 row a step, got {max_batch_tokens} and {max_rows}")
        self.max_batch_tokens = max_batch_tokens
        self.max_rows = min(max_rows, max_batch_tokens)
        self._pool = BlockPool(num_blocks, block_size, prefix_caching)
        self._rows: dict[int, Row] = {}
        self._running: list[Row] = []
        """Most senior first."""
        self._waiting = FairQueue()
        self._admitted = 0
        self._prefixes: dict[int, _HeldPrefix] = {}
        """By first block."""
        self._step: tuple[RowPlan, ...] = ()
        """Planned last, and not assumed."""
        self._assumed: tuple[RowPlan, ...] | None = None
        """The step before it, whose result is still to come though its rows have moved on."""

    @property
    def block_size(self) -> int:
        return self._pool.block_size

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def usage(self) -> float:
        """0 .. 1: blocks that no row can take now, over all."""
        return 1.0 - self._pool.num_free / self._pool.num_usable

    def running_by_key(self) -> dict[str, int]:
        return dict(Counter(row.new.fairness_key for row in list(self._running)))

    def waiting_by_key(self) -> dict[str, int]:
        return self._waiting.counts()

    def cached_tokens(self, row_id: int) -> int:
        """Prompt tokens that the cache held when the row was first admitted; virtual ones are not counted."""
        return self._rows[row_id].cached_tokens

    def is_read_out(self, row_id: int) -> bool:
        """Every token of a row with a readout is computed: the engine finishes it."""
        return self._rows[row_id].is_read_out

    def max_row_tokens(self, prefix: PrefixBlocks | None = None) -> int:
        """The most tokens (virtual, prompt and generated) that one row can hold. The last is never computed."""
        own = self._pool.num_usable - sum(len(held.prefix.blocks) for held in self._prefixes.values())
        shared = len(prefix.shared) if prefix else 0
        return (own + shared) * self.block_size + 1

    def can_ever_fit(self, total_tokens: int, prefix: PrefixBlocks | None = None) -> bool:
        return total_tokens <= self.max_row_tokens(prefix)

    def add(self, new: NewRow) -> None:
        """InvalidRequest for a row that could not run even alone."""
        if new.id in self._rows:
            raise ValueError(f"row {new.id} exists already")
        if not self.can_ever_fit(new.max_total, new.prefix):
            raise InvalidRequest(
                "stopping.max_tokens",
                f"expected at most {self.max_row_tokens(new.prefix)} tokens (prompt, virtual and generated), "
                f"which is what the KV cache holds, got {new.max_total}",
            )
        row = Row(new, self.block_size)
        if new.prefix:
            self._prefixes[new.prefix.blocks[0]].users += 1
        self._rows[new.id] = row
        self._waiting.push(row)

    def finish(self, row_id: int) -> None:
        """The row has ended: its blocks are free at once, and findable while nothing overwrites them."""
        row = self._rows.pop(row_id)
        if row.blocks:
            self._running.remove(row)
            self._pool.release(row.blocks[row.num_shared :])
        else:
            self._waiting.remove(row)
        if row.new.prefix:
            held = self._prefixes[row.new.prefix.blocks[0]]
            held.users -= 1
            self._release_if_unused(held)

    def abort(self, row_id: int) -> None:
        """As `finish`; nothing for a row that is not there (any more)."""
        if row_id in self._rows:
            self.finish(row_id)

    def allocate_prefix(self, length: int, owner: str) -> PrefixBlocks:
        """Blocks for `length` positions, which the caller fills before the next step. They count as used.

        Preempts rows where it must. AdapterMemoryExhausted where some row could then never fit.
        """
        if length < 1:
            raise ValueError(f"expected a prefix of at least 1 token for {owner!r}, got {length}")
        count = self._pool.blocks_for(length)
        largest = max((self._own_blocks(row.new) for row in self._rows.values()), default=1)
        own = (self.max_row_tokens() - 1) // self.block_size
        if count > own - largest:
            raise AdapterMemoryExhausted(
                f"the prefix of {owner!r} ({length} tokens) needs {count} KV cache blocks of {self.block_size} tokens, "
                f"{max(own - largest, 0)} can be given: {own} are not prefixes', {largest} of them are needed by rows"
            )
        while self._pool.num_free < count:
            self._preempt(self._running[-1])
        blocks = tuple(self._pool.allocate(count))
        tail = blocks[-1] if length % self.block_size else None
        prefix = PrefixBlocks(owner, length, blocks if tail is None else blocks[:-1], tail)
        self._prefixes[blocks[0]] = _HeldPrefix(prefix)
        return prefix

    def free_prefix(self, prefix: PrefixBlocks) -> None:
        """The adapter lets go. Rows that use the prefix keep it until they end; no new row may name it."""
        held = self._prefixes[prefix.blocks[0]]
        assert not held.let_go, f"the prefix of {prefix.owner!r} is freed twice"
        held.let_go = True
        self._release_if_unused(held)

    def _release_if_unused(self, held: _HeldPrefix) -> None:
        if held.let_go and not held.users:
            self._pool.release(held.prefix.blocks)
            del self._prefixes[held.prefix.blocks[0]]

    def _own_blocks(self, new: NewRow) -> int:
        """Blocks beside the prefix's that the row may come to need."""
        return self._pool.blocks_for(new.max_total - 1) - (len(new.prefix.shared) if new.prefix else 0)

    def plan(self) -> StepPlan | None:
        """The next step, or None where no row is left to run, or none until the step that is assumed has its result."""
        chosen: list[tuple[Row, int]] = []
        preempted = self._choose_decodes(chosen)
        budget = self.max_batch_tokens - len(chosen)
        budget = self._choose_prefills(chosen, budget)
        if not preempted:
            self._choose_waiting(chosen, budget)
        if not chosen:
            assert not self._rows or self._assumed is not None, "rows are left and none can run"
            self._step = ()
            return None
        chosen.sort(key=lambda choice: (choice[1] > 1, choice[0].new.slot))
        self._step = tuple([row.plan(count) for row, count in chosen])
        return StepPlan(self._step, tuple([row.copy for row, _ in chosen if row.copy]))

    def _choose_decodes(self, chosen: list[tuple[Row, int]]) -> bool:
        """Every running row with one token to compute. Victims are junior, so never one that is chosen already."""
        running, before = self._running, len(self._running)
        i = 0
        while i < len(running):
            row = running[i]
            i += 1
            if row.pending == 1 and not row.is_full and self._grow(row):
                chosen.append((row, 1))
        return len(running) < before

    def _grow(self, row: Row) -> bool:
        """A block for the row's last token if it lacks one. False: there was none and the row itself had to go."""
        if len(row.tokens) <= len(row.blocks) * self.block_size:
            return True
        while not self._pool.num_free:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is row:
                return False
        row.blocks += self._pool.allocate(1)
        return True

    def _preempt(self, row: Row) -> None:
        self._running.remove(row)
        self._pool.release(row.blocks[row.num_shared :])
        row.place([], 0, 0, None)
        self._waiting.push_preempted(row)

    def _choose_prefills(self, chosen: list[tuple[Row, int]], budget: int) -> int:
        for row in self._running:
            if budget > 0 and row.pending > 1:
                count = row.chunk(budget, whole=not _prefills(chosen))
                if count:
                    chosen.append((row, count))
                    budget -= count
        return budget

    def _choose_waiting(self, chosen: list[tuple[Row, int]], budget: int) -> None:
        """In fair order and no further than the first row that does not fit: small rows never overtake a large one."""
        while budget > 0 and len(self._running) < self.max_rows:
            row = self._waiting.peek()
            if row is None or not self._admit(row):
                return
            count = row.chunk(budget, whole=not _prefills(chosen))
            if count:
                chosen.append((row, count))
                budget -= count

    def _admit(self, row: Row) -> bool:
        """Give the row blocks for all of its tokens, cached ones first. False where too few are free.

        One block for each running row is left over, so that the newcomer is not preempted at once.
        """
        pool, shared = self._pool, row.num_shared
        keys = row.keys(shared, row.num_readable // self.block_size) if pool.prefix_caching else ()
        hits = pool.match(keys)
        fresh = pool.blocks_for(len(row.tokens)) - shared - len(hits)
        if fresh + pool.num_unreferenced(hits) + len(self._running) > pool.num_free:
            return False
        pool.acquire(hits)
        prefix = row.new.prefix
        head = prefix.shared if prefix else ()
        blocks = [*head, *hits, *pool.allocate(fresh)]
        found = shared + len(hits)
        copy = (prefix.tail, blocks[shared]) if prefix and prefix.tail is not None and not hits else None
        base = prefix.length if prefix else 0
        row.place(blocks, max(base, found * self.block_size), found, copy)
        self._waiting.remove(row)
        self._rank(row)
        insort(self._running, row, key=_seniority)
        return True

    def _rank(self, row: Row) -> None:
        """At the first admission: seniority, what the cache saved, and the charge for the rest."""
        if row.order is not None:
            return
        row.order = (-row.new.priority, self._admitted)
        self._admitted += 1
        row.cached_tokens = row.num_counted(row.num_computed)
        self._waiting.charge(row, PROMPT_TOKEN_COST * row.pending)

    def assume(self) -> None:
        """Let the rows of the step that `plan` returned last move on before its result is there.

        Each that samples has one more token, which nobody knows yet: the next plan says so, and `update` brings it. The
        next result that `update` takes is this step's. Every step before it must have been answered: what a row has
        computed is what it is known by in the prefix cache. A caller that loses the step ends its rows (`forget`).
        """
        assert self._assumed is None, "two steps cannot be assumed at once"
        self._assumed, self._step = self._step, ()
        for planned in self._assumed:
            row = self._rows.get(planned.row)
            if row is not None and row.blocks:
                self._advance(row, planned)
                if planned.samples:
                    self._draw(row, None)

    def forget(self) -> None:
        """The step that is assumed will have no result. Its rows have been ended."""
        self._assumed = None

    def update(self, result: StepResult) -> tuple[RowResult, ...]:
        """Take in the step that is assumed, or else the one that `plan` returned last.

        Returns the results of rows that are still there and have a new token, log-probabilities of prompt tokens or
        states, or are read out; the new tokens are in the rows. A row whose result does not answer its plan is
        not taken further: the engine ends it.
        """
        assumed = self._assumed is not None
        step = self._assumed if self._assumed is not None else self._step
        if assumed:
            self._assumed = None
        else:
            self._step = ()
        assert len(step) == len(result.rows), f"{len(step)} rows planned, {len(result.rows)} results"
        news: list[RowResult] = []
        for planned, got in zip(step, result.rows, strict=True):
            assert planned.row == got.row, f"row {planned.row} planned, result of row {got.row}"
            row = self._rows.get(planned.row)
            if row is None or not got.answers(planned) or not (assumed or row.blocks):
                continue
            if not assumed:
                self._advance(row, planned)
                if got.token is not None:
                    self._draw(row, got.token)
            elif got.token is not None:
                row.learn(got.token)
            if got.token is not None or got.prompt_logprobs or got.states or row.is_read_out:
                news.append(got)
        return tuple(news)

    def _advance(self, row: Row, planned: RowPlan) -> None:
        row.copy = None
        row.num_computed = planned.start + len(planned.tokens)
        if planned.readout is None:
            row.next_reported += len(planned.next_tokens)
        else:
            row.next_reported += len(planned.tokens) - planned.read_from
        if self._pool.prefix_caching and row.num_computed // self.block_size > row.num_registered:
            self._register(row)

    def _draw(self, row: Row, token: int | None) -> None:
        row.draw(token)
        assert len(row.tokens) <= row.new.max_total, f"row {row.new.id} outgrew its {row.new.max_total} tokens"
        self._waiting.charge(row, GENERATED_TOKEN_COST)

    def _register(self, row: Row) -> None:
        """Blocks that have become full and computed can be found from now on."""
        first, stop = row.num_registered, row.num_computed // self.block_size
        for i, key in enumerate(row.keys(first, stop), first):
            self._pool.register(row.blocks[i], key)
        row.num_registered = stop

    def check(self) -> None:
        """Prove that every block and row has exactly one state and owner. IntegrityError otherwise."""
        owners = Counter(block for held in self._prefixes.values() for block in held.prefix.blocks)
        users: Counter[int] = Counter()
        for row in self._rows.values():
            owners.update(row.blocks[row.num_shared :])
            if row.new.prefix:
                users[row.new.prefix.blocks[0]] += 1
        self._pool.check(owners)
        if any(held.users != users[first] for first, held in self._prefixes.items()):
            raise IntegrityError(f"prefix users differ from the rows that name them: {dict(users)}")
        running = {row.new.id for row in self._running}
        if running != {i for i, row in self._rows.items() if row.blocks} or len(running) != len(self._running):
            raise IntegrityError("running rows are not those that hold blocks")
        if len(self._waiting) + len(running) != len(self._rows):
            raise IntegrityError(f"{len(self._rows)} rows, {len(running)} running, {len(self._waiting)} waiting")
