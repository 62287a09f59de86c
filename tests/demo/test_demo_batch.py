"""The demo reads who is in the batch from the metrics that the server writes."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from peftmux.demo.batch import Batch, running_rows
from peftmux.runtime.engine.api import EngineStats
from peftmux.runtime.server.metrics import AdapterTokens
from peftmux.runtime.server.scrape import EngineCollector


def scrape(running: dict[str, int], labels: int) -> str:
    stats = EngineStats(sum(running.values()), 0, 0.0, (), running, {}, True)
    registry = CollectorRegistry()
    registry.register(EngineCollector(lambda: stats, AdapterTokens(labels), labels, None))
    return generate_latest(registry).decode()


def test_rows_by_adapter_go_through_the_servers_metrics() -> None:
    running = {"": 3, "sort-down": 2, "team/x": 1}
    assert running_rows(scrape(running, 50)) == running


def test_adapters_past_the_label_limit_share_one() -> None:
    assert running_rows(scrape({"a": 4, "b": 3, "c": 2, "d": 1}, 2)) == {"a": 4, "b": 3, "other": 3}


def test_batch_keeps_the_largest() -> None:
    batch = Batch()
    for rows in ({"": 1}, {"": 2, "a": 2}, {"": 3}):
        batch.see(rows)
    assert batch.rows == {"": 2, "a": 2}
