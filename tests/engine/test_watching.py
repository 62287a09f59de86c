"""UpdateAdapter and WatchAdapters: what changes, who is told, and what a share of service is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import cast

import pytest

from peftmux.adapters.errors import AdapterInvalid
from peftmux.runtime.engine import watch
from peftmux.runtime.engine.api import AdapterInfo, AdapterState
from peftmux.runtime.engine.local import LocalEngine
from peftmux.runtime.errors import AdapterNotFound, Draining, InvalidRequest, QueueFull
from tests.engine.harness import StepGate, ask, load, request, running, until

S = AdapterState


@asynccontextmanager
async def watching(engine: LocalEngine) -> AsyncIterator[AsyncGenerator[AdapterInfo]]:
    async with aclosing(cast("AsyncGenerator[AdapterInfo]", engine.watch_adapters())) as infos:
        yield infos


async def take(infos: AsyncGenerator[AdapterInfo], count: int) -> list[AdapterInfo]:
    async with asyncio.timeout(20):
        return [await anext(infos) for _ in range(count)]


async def test_what_there_is_then_every_change_in_order() -> None:
    async with running() as engine:
        await load(engine, "lora")
        async with watching(engine) as infos:
            (first,) = await take(infos, 1)
            assert first == engine.get_adapter("lora")
            await load(engine, "prefix", pinned=True)
            await engine.update_adapter("lora", weight=3.0)
            await engine.update_adapter("lora", pinned=True)
            with pytest.raises(AdapterInvalid):
                await load(engine, "xlora")
            await load(engine, "lora_rslora", "lora", replace=True)
            await engine.unload_adapter("prefix")
            seen = await take(infos, 9)
        assert [(i.name, i.state, i.weight, i.pinned) for i in seen] == [
            ("prefix", S.LOADING, 1.0, False),
            ("prefix", S.READY, 1.0, True),
            ("lora", S.READY, 3.0, False),
            ("lora", S.READY, 3.0, True),
            ("xlora", S.LOADING, 1.0, False),
            ("xlora", S.FAILED, 1.0, False),
            ("lora", S.READY, 3.0, False),  # LoadAdapter says whether its revision is pinned
            ("prefix", S.DRAINING, 1.0, True),
            ("prefix", S.UNLOADED, 1.0, True),
        ]
        assert "classifier" in seen[5].error
        assert seen[6].revision == engine.get_adapter("lora").revision != first.revision
        assert (seen[8].bytes, seen[8].residency) == (0, None)
        assert not engine._adapters._watchers._watchers


async def test_every_watcher_sees_all_and_a_fast_one_waits_for_none() -> None:
    async with running() as engine, watching(engine) as slow, watching(engine) as fast:
        tasks = [asyncio.create_task(anext(infos)) for infos in (slow, fast)]
        await asyncio.sleep(0)
        await load(engine, "lora")
        assert [(await task).state for task in tasks] == [S.LOADING] * 2
        for weight in (2.0, 4.0):
            await engine.update_adapter("lora", weight=weight)
        assert [info.weight for info in await take(fast, 3)] == [1.0, 2.0, 4.0]
        assert [info.weight for info in await take(slow, 3)] == [1.0, 2.0, 4.0]


async def test_one_that_reads_too_slowly_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MAX_BEHIND", 3)
    async with running() as engine:
        await load(engine, "lora")
        async with watching(engine) as infos:
            await take(infos, 1)
            for weight in range(1, 6):
                await engine.update_adapter("lora", weight=float(weight))
            await asyncio.sleep(0)
            assert [info.weight for info in await take(infos, 3)] == [1.0, 2.0, 3.0]
            with pytest.raises(QueueFull, match="watch them again"):
                await take(infos, 1)


async def test_watchers_do_not_hold_up_a_shutdown() -> None:
    async with running() as engine:
        async with watching(engine) as infos:
            waiting = asyncio.create_task(anext(infos))
            await asyncio.sleep(0)
            drained = asyncio.create_task(engine.drain(10.0))
            with pytest.raises(Draining):
                await asyncio.wait_for(waiting, 5)
            await asyncio.wait_for(drained, 5)
        with pytest.raises(Draining):
            await anext(aiter(engine.watch_adapters()))


@pytest.mark.parametrize("weight", [0.0, -2.0, float("nan"), float("inf")])
async def test_a_share_is_a_positive_number(weight: float) -> None:
    async with running() as engine:
        await load(engine, "lora")
        with pytest.raises(InvalidRequest, match="positive") as refusal:
            await engine.update_adapter("lora", weight=weight)
        assert refusal.value.field == "weight"
        assert engine.get_adapter("lora").weight == 1.0
        with pytest.raises(AdapterNotFound):
            await engine.update_adapter("nobody", weight=1.0)


async def test_a_share_of_four_is_served_before_one() -> None:
    """One row runs at a time; equal requests wait for both adapters."""
    async with running(max_rows=1) as engine:
        await load(engine, "lora")
        await load(engine, "lora_rslora")
        await engine.update_adapter("lora_rslora", weight=4.0)
        gate = StepGate(engine)
        gate.hold()
        order: list[str] = []

        async def one(name: str) -> None:
            await ask(engine, request([5, 9, 17, 33], name, 4))
            order.append(name)

        first = asyncio.create_task(ask(engine, request([5, 9], "", 4)))
        await gate.step_begins()
        rows = [asyncio.create_task(one(name)) for _ in range(8) for name in ("lora", "lora_rslora")]
        await until(lambda: engine._open == 17)  # the engine's thread takes them in before its next step
        gate.remove()
        await asyncio.gather(first, *rows)
        early = order[:10]
        assert early.count("lora_rslora") >= 3 * early.count("lora") > 0
