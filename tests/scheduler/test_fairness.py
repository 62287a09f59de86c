"""Virtual token counters: who is served, in which proportion, and what idling is worth."""

from __future__ import annotations

from collections import Counter

from peftmux.runtime.params import OutputOptions, SamplingParams
from peftmux.runtime.scheduler.fairness import FairQueue
from peftmux.runtime.scheduler.row import NewRow, Row


def waiting(id: int, key: str, weight: float = 1.0) -> Row:
    new = NewRow(id, 0, (1, 2), 9, SamplingParams(), OutputOptions(), fairness_key=key, weight=weight)
    return Row(new, 4)


def serve(queue: FairQueue, count: int, cost: float = 10.0) -> list[str]:
    """The keys of the next rows admitted, each charged `cost`."""
    keys = []
    for _ in range(count):
        row = queue.peek()
        assert row is not None
        queue.remove(row)
        queue.charge(row, cost)
        keys.append(row.new.fairness_key)
    return keys


def queued(rows: list[Row]) -> FairQueue:
    queue = FairQueue()
    for row in rows:
        queue.push(row)
    return queue


def test_a_flood_does_not_hold_back_a_light_key():
    queue = queued([*(waiting(i, "flood") for i in range(50)), *(waiting(100 + i, "light") for i in range(3))])
    assert Counter(serve(queue, 6)) == {"flood": 3, "light": 3}


def test_service_is_proportional_to_weight():
    queue = queued([waiting(i, "abc"[i % 3], weight=(1.0, 2.0, 1.0)[i % 3]) for i in range(300)])
    assert Counter(serve(queue, 120)) == {"a": 30, "b": 60, "c": 30}


def test_service_counts_tokens_not_requests():
    queue = queued([waiting(i, "ab"[i % 2]) for i in range(200)])
    served = Counter()
    for _ in range(66):
        row = queue.peek()
        queue.remove(row)
        queue.charge(row, 20.0 if row.new.fairness_key == "a" else 10.0)
        served[row.new.fairness_key] += 1
    assert served == {"a": 22, "b": 44}


def test_idling_earns_no_claim():
    queue = queued([waiting(0, "idle")])
    serve(queue, 1)
    for i in range(1, 101):
        queue.push(waiting(i, "busy"))
    serve(queue, 50)
    for i in range(200, 250):
        queue.push(waiting(i, "idle"))
    assert Counter(serve(queue, 20)) == {"busy": 10, "idle": 10}


def test_a_key_that_finds_an_empty_queue_is_lifted_to_the_last_that_left():
    queue = queued([waiting(i, "busy") for i in range(10)])
    serve(queue, 10)
    queue.push(waiting(20, "new"))
    assert queue.counter("new") == queue.counter("busy") == 100.0


def test_a_debt_is_not_forgiven_by_leaving():
    queue = queued([waiting(i, "heavy") for i in range(5)])
    queue.push(waiting(9, "light"))
    serve(queue, 1, cost=500.0)
    while queue.counts().get("heavy"):
        row = queue._by_key["heavy"][0][3]
        queue.remove(row)
    queue.push(waiting(30, "heavy"))
    assert queue.counter("heavy") == 500.0


def test_counters_of_idle_keys_are_dropped():
    queue = queued([waiting(0, "standing")])
    for i in range(1, 5000):
        row = waiting(i, f"key {i}")
        queue.push(row)
        queue.remove(row)
    assert len(queue._counters) < 1100


def test_one_key_cannot_starve_another_in_the_scheduler(serving):
    batch = serving(num_blocks=64, max_rows=2)
    for id in range(20):
        batch.add(id, [id, 2, 3], new_tokens=4, fairness_key="flood")
    for id in range(20, 23):
        batch.add(id, [id, 2, 3], new_tokens=4, fairness_key="light")
    order = []
    while batch.step():
        order += [id for id in sorted(batch.finished) if id not in order]
    assert max(order.index(id) for id in range(20, 23)) <= 6
