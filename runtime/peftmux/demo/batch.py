"""Who ran in one batch: read from the server's metrics while requests are under way."""

from __future__ import annotations

import asyncio
import contextlib
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

METRIC = "peftmux_adapter_requests_running"
EVERY = 0.01


@dataclass(slots=True)
class Batch:
    """The largest batch seen: rows by adapter name, "" for the base."""

    rows: dict[str, int] = field(default_factory=dict)

    def see(self, rows: dict[str, int]) -> None:
        if sum(rows.values()) > sum(self.rows.values()):
            self.rows = rows


@contextlib.asynccontextmanager
async def watch_batch(metrics: str) -> AsyncIterator[Batch]:
    """Look every few milliseconds while the block runs. `metrics`: HOST:PORT."""
    batch = Batch()
    watcher = asyncio.create_task(_watch(metrics, batch))
    try:
        yield batch
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher


async def _watch(metrics: str, batch: Batch) -> None:
    while True:
        batch.see(running_rows(await asyncio.to_thread(_scrape, metrics)))
        await asyncio.sleep(EVERY)


def _scrape(metrics: str) -> str:
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=5.0) as response:
        text: str = response.read().decode()
        return text


def running_rows(text: str) -> dict[str, int]:
    """Rows in the batch by adapter, from Prometheus' text format."""
    return {
        sample.labels["adapter"]: int(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == METRIC and sample.value
    }
