"""One engine over the Llama fixture for each module of tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from peftmux.runtime.engine.local import LocalEngine
from tests.engine.harness import StepGate, check_quiet, load, running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[LocalEngine]:
    """With "lora" and "prefix" loaded, blocks of 4 tokens, 4 rows at a time and 3 in the queue."""
    async with running(block_size=4, max_rows=4, max_queued_requests=3) as engine:
        await load(engine, "lora")
        await load(engine, "prefix")
        usage = engine.stats().kv_cache_usage
        yield engine
        await check_quiet(engine, usage)


@pytest.fixture
def gate(engine: LocalEngine) -> Iterator[StepGate]:
    gate = StepGate(engine)
    yield gate
    gate.remove()
