"""Who goes next: priority, then the fairness key that has been served least, then arrival.

Source of the counters: Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), algorithms 2 and 3, with
weights. Each key has a virtual token counter; a row costs its computed prompt tokens once and two for every token it
generates, divided by its weight. A key that comes back from idling is lifted to the least counter in the queue, or to
that of the last key to leave an empty one, so that nobody saves up a claim by staying away.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from peftmux.runtime.scheduler.row import Row

PROMPT_TOKEN_COST = 1.0
GENERATED_TOKEN_COST = 2.0
_KEYS_BEFORE_PRUNING = 1024


class FairQueue:
    """Waiting rows. Preempted rows precede new ones of their priority: they have had their turn and lost it."""

    def __init__(self) -> None:
        self._by_key: dict[str, list[tuple[int, float, int, Row]]] = {}
        self._resumed: list[tuple[tuple[int, int], Row]] = []
        self._counters: dict[str, float] = {}
        self._last_left = ""
        self._entered = 0
        self._entries: dict[int, tuple[int, float, int, Row]] = {}

    def __len__(self) -> int:
        return len(self._entries) + len(self._resumed)

    def counts(self) -> dict[str, int]:
        """Waiting rows by fairness key. Other threads may ask: `list` copies in one step of the interpreter."""
        counts = {key: len(entries) for key, entries in list(self._by_key.items())}
        for _, row in list(self._resumed):
            counts[row.new.fairness_key] = counts.get(row.new.fairness_key, 0) + 1
        return counts

    def push(self, row: Row) -> None:
        """A new row."""
        key = row.new.fairness_key
        if key not in self._by_key:
            self._counters[key] = max(self._counters.get(key, 0.0), self._floor())
            self._by_key[key] = []
            self._prune()
        entry = (-row.new.priority, row.new.arrival, self._entered, row)
        self._entered += 1
        self._entries[row.new.id] = entry
        insort(self._by_key[key], entry)

    def push_preempted(self, row: Row) -> None:
        assert row.order is not None
        insort(self._resumed, (row.order, row))

    def peek(self) -> Row | None:
        """The row to admit next."""
        if not self._by_key:
            return self._resumed[0][1] if self._resumed else None
        heads = ((e[0][0], self._counters[key], e[0][1:3], e[0][3]) for key, e in self._by_key.items())
        new = min(heads, key=lambda head: head[:3])
        if self._resumed and self._resumed[0][0][0] <= new[0]:
            return self._resumed[0][1]
        return new[3]

    def remove(self, row: Row) -> None:
        """The row is admitted or gone. Costs one bisection."""
        entry = self._entries.pop(row.new.id, None)
        if entry is None:
            self._resumed = [item for item in self._resumed if item[1] is not row]
            return
        key = row.new.fairness_key
        entries = self._by_key[key]
        del entries[bisect_left(entries, entry)]
        if not entries:
            del self._by_key[key]
            self._last_left = key

    def charge(self, row: Row, cost: float) -> None:
        key = row.new.fairness_key
        self._counters[key] = self._counters.get(key, 0.0) + cost / row.new.weight

    def counter(self, key: str) -> float:
        return self._counters.get(key, 0.0)

    def _floor(self) -> float:
        if self._by_key:
            return min(self._counters[key] for key in self._by_key)
        return self._counters.get(self._last_left, 0.0)

    def _prune(self) -> None:
        """Idle counters at or below the floor say nothing that lifting would not; others are debts and stay."""
        if len(self._counters) <= _KEYS_BEFORE_PRUNING:
            return
        floor = self._floor()
        self._counters = {
            key: value
            for key, value in self._counters.items()
            if key in self._by_key or key == self._last_left or value > floor
        }
