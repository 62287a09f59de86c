"""However a request ends, its row and blocks are free within a step and the others never notice."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from peftmux.runtime.engine.local import LocalEngine
from peftmux.runtime.engine.request import NoText, TextStream
from peftmux.runtime.errors import DeadlineExceeded, Draining, EngineDead, QueueFull, StepFailed
from peftmux.runtime.params import FinishReason
from tests.engine.harness import (
    Answer,
    StepGate,
    ask,
    ask_all,
    check_quiet,
    in_engine_thread,
    load,
    opened,
    request,
    running,
    until,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = [1, 44, 48, 90, 66]


def row_count(engine: LocalEngine) -> int:
    return engine.stats().running + engine.stats().waiting


async def test_a_request_cancelled_in_the_queue_never_runs(engine: LocalEngine, gate: StepGate) -> None:
    gate.hold()
    first = asyncio.create_task(ask(engine, request(PROMPT, "lora")))
    await gate.step_begins()
    queued = asyncio.create_task(ask(engine, request(PROMPT, "prefix")))
    await asyncio.sleep(0)
    queued.cancel()
    with pytest.raises(asyncio.CancelledError):
        await queued
    gate.release()
    assert len((await first).ids) == 6
    assert engine.get_adapter("prefix").requests_in_flight == 0


@pytest.mark.parametrize("adapter", ["", "lora", "prefix"])
async def test_a_row_cancelled_in_a_step_is_free_before_the_next(
    engine: LocalEngine, gate: StepGate, adapter: str
) -> None:
    expected = await ask(engine, request(PROMPT, max_tokens=40))
    usage = engine.stats().kv_cache_usage
    other = asyncio.create_task(ask(engine, request(PROMPT, max_tokens=40)))
    async with opened(engine, request(PROMPT, adapter, 100)) as stream:
        await anext(stream)
        gate.hold()
        await gate.step_begins()
        steps = gate.entered
    gate.release()
    rows, later = await in_engine_thread(engine, lambda: (engine._core.scheduler.num_running, gate.entered))
    assert (rows, later) == (1, steps)
    assert (await other).ids == expected.ids
    await check_quiet(engine, usage)


async def test_a_cancelled_task_frees_its_row(engine: LocalEngine) -> None:
    usage = engine.stats().kv_cache_usage
    tasks = [asyncio.create_task(ask(engine, request([5 + i], "lora", 100))) for i in range(4)]
    await until(lambda: engine.stats().running == 4)
    for task in tasks:
        task.cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(end) for end in ends] == [asyncio.CancelledError] * 4
    await check_quiet(engine, usage)


async def test_closing_after_the_last_delta_is_nothing_special(engine: LocalEngine) -> None:
    async with opened(engine, request(PROMPT, max_tokens=2)) as stream:
        async for delta in stream:
            if delta.finish_reason:
                break
    await check_quiet(engine, engine.stats().kv_cache_usage)


async def test_a_reader_that_stops_midway_gives_all_back(engine: LocalEngine) -> None:
    usage = engine.stats().kv_cache_usage
    for _ in range(20):
        async with opened(engine, request(PROMPT, "prefix", 50)) as stream:
            await anext(stream)
    await check_quiet(engine, usage)


async def test_a_full_queue_refuses_and_then_serves(engine: LocalEngine, gate: StepGate) -> None:
    """4 rows and 3 in the queue."""
    gate.hold()
    tasks = [asyncio.create_task(ask(engine, request([5 + i], max_tokens=3))) for i in range(1)]
    await gate.step_begins()
    tasks += [asyncio.create_task(ask(engine, request([6 + i], max_tokens=3))) for i in range(9)]
    await asyncio.sleep(0.01)
    gate.release()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [r for r in results if isinstance(r, BaseException)]
    assert len(refused) == 3
    assert all(isinstance(r, QueueFull) and r.retry_after for r in refused)
    assert all(len(r.ids) == 3 for r in results if not isinstance(r, BaseException))


async def test_a_passed_deadline_is_refused(engine: LocalEngine) -> None:
    with pytest.raises(DeadlineExceeded):
        await ask(engine, request(PROMPT, "lora", deadline=time.monotonic() - 0.001))
    assert engine.get_adapter("lora").requests_in_flight == 0


@pytest.mark.parametrize("where", ["running", "waiting"])
async def test_a_deadline_that_comes_ends_the_row(engine: LocalEngine, gate: StepGate, where: str) -> None:
    gate.hold()
    usage = engine.stats().kv_cache_usage
    others = [asyncio.create_task(ask(engine, request([5 + i], max_tokens=5))) for i in range(4 * (where == "waiting"))]
    await asyncio.sleep(0.01)
    timed = asyncio.create_task(ask(engine, request(PROMPT, "lora", 100, deadline=time.monotonic() + 0.05)))
    await asyncio.sleep(0.06)
    gate.release()
    with pytest.raises(DeadlineExceeded):
        await timed
    assert [len(answer.ids) for answer in await asyncio.gather(*others)] == [5] * len(others)
    await check_quiet(engine, usage)


async def test_a_failed_step_ends_its_rows_and_no_other(engine: LocalEngine, gate: StepGate) -> None:
    usage = engine.stats().kv_cache_usage
    gate.hold()
    tasks = [asyncio.create_task(ask(engine, request(PROMPT, name, 4))) for name in ("", "lora", "prefix")]
    await gate.step_begins()
    gate.failures.append(MemoryError("no room on the device"))
    gate.release()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    failed = [r for r in results if isinstance(r, BaseException)]
    assert failed
    assert all(isinstance(r, StepFailed) and "device" in str(r) for r in failed)
    assert all("no room" not in str(r) for r in failed), "what failed inside is for the log"
    assert [len(a.ids) for a in await ask_all(engine, [request(PROMPT, n, 4) for n in ("", "lora", "prefix")])] == [
        4
    ] * 3
    assert engine.stats().healthy
    await check_quiet(engine, usage)


async def test_an_engine_that_fails_again_and_again_is_dead() -> None:
    async with running() as doomed:
        await load(doomed, "lora")
        gate = StepGate(doomed)
        gate.failures += [RuntimeError("the device is gone")] * 3
        gate.hold()
        tasks = [asyncio.create_task(ask(doomed, request(PROMPT, name))) for name in ("", "lora")]
        for _ in range(3):
            await asyncio.sleep(0.005)
            tasks.append(asyncio.create_task(ask(doomed, request(PROMPT, "lora"))))
            gate.release()
            await asyncio.sleep(0.02)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, StepFailed | EngineDead) for r in results)
        assert not doomed.stats().healthy
        with pytest.raises(EngineDead):
            await ask(doomed, request(PROMPT, "lora"))
        with pytest.raises(EngineDead):
            await load(doomed, "prefix")
        assert doomed.get_adapter("lora").requests_in_flight == 0
        await asyncio.wait_for(doomed.unload_adapter("lora"), 5)
        assert doomed.list_adapters() == ()


async def test_a_request_beside_the_death_of_the_engine_is_answered() -> None:
    """Posted while the thread is on its way out: no caller may wait for ever."""
    for _ in range(10):
        async with running() as doomed:
            task = asyncio.create_task(ask(doomed, request(PROMPT, max_tokens=100)))
            await until(lambda: doomed.stats().running == 1)
            doomed._thread.post(_fail)
            late = [asyncio.create_task(ask(doomed, request(PROMPT))) for _ in range(5)]
            async with asyncio.timeout(10):
                results = await asyncio.gather(task, *late, return_exceptions=True)
            assert all(isinstance(r, EngineDead) for r in results)


def _fail() -> None:
    raise RuntimeError("a bug in the engine")


async def test_drain_lets_short_streams_finish_and_ends_long_ones() -> None:
    async with running() as leaving:
        gate = StepGate(leaving)
        pace = _paced(gate)
        short = asyncio.create_task(ask(leaving, request(PROMPT, max_tokens=5)))
        long = asyncio.create_task(ask(leaving, request(PROMPT, max_tokens=120)))
        await until(lambda: leaving.stats().running == 2)
        started = time.monotonic()
        drain = asyncio.create_task(leaving.drain(1.0))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await ask(leaving, request(PROMPT))
        with pytest.raises(Draining):
            await load(leaving, "lora")
        assert (await short).finish is FinishReason.LENGTH
        with pytest.raises(Draining):
            await long
        await drain
        assert 0.9 < time.monotonic() - started < 3.0
        assert not leaving.stats().healthy
        pace.clear()


def _paced(gate: StepGate, seconds: float = 0.02) -> list[float]:
    """Every step takes a while; empty the list to stop that."""
    launch, pace = gate._launch, [seconds]

    def slow(*step: Any) -> Any:
        time.sleep(sum(pace))
        return launch(*step)

    gate._launch = slow  # type: ignore[assignment]
    return pace


async def test_drain_without_streams_is_over_at_once() -> None:
    async with running() as leaving:
        started = time.monotonic()
        await leaving.drain(30.0)
        assert time.monotonic() - started < 2.0


class _Broken(NoText):
    """A tokenizer's library that fails, at a token or at the end."""

    def __init__(self, at: int | None = None) -> None:
        self._left = at

    def push(self, token_ids: tuple[int, ...]) -> tuple[str, bool]:
        if self._left is not None:
            self._left -= 1
            if not self._left:
                raise UnicodeError("no such piece")
        return "", False

    def finish(self) -> str:
        raise UnicodeError("no such piece")


@pytest.mark.parametrize("at", [1, 3, None], ids=["first", "third", "end"])
async def test_a_request_whose_text_fails_ends_alone(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, at: int | None
) -> None:
    expected = await ask(engine, request(PROMPT, "lora", 12))
    usage = engine.stats().kv_cache_usage
    streams: list[TextStream] = [_Broken(at), NoText()]
    monkeypatch.setattr(engine._text, "stream", lambda *_: streams.pop(0))
    wanted = [request(PROMPT, "prefix", 6), request(PROMPT, "lora", 12)]
    failed, other = await asyncio.gather(*(ask(engine, one) for one in wanted), return_exceptions=True)
    assert isinstance(failed, StepFailed)
    assert "piece" not in str(failed), "what failed inside is for the log"
    assert isinstance(other, Answer)
    assert other.ids == expected.ids
    assert engine.stats().healthy
    await check_quiet(engine, usage)


async def test_a_cancelled_request_whose_text_fails_ends_alone(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = engine.stats().kv_cache_usage
    monkeypatch.setattr(engine._text, "stream", lambda *_: _Broken())
    async with opened(engine, request(PROMPT, "prefix", 100)) as stream:
        await anext(stream)
    await check_quiet(engine, usage)
    assert engine.stats().healthy


async def test_a_request_that_cannot_be_queued_ends_alone(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = engine.stats().kv_cache_usage

    def fails(*_: Any) -> None:
        raise ValueError("a bug in the scheduler")

    with monkeypatch.context() as patch:
        patch.setattr(engine._core.scheduler, "add", fails)
        with pytest.raises(StepFailed):
            await ask(engine, request(PROMPT, "lora"))
    assert len((await ask(engine, request(PROMPT, "lora"))).ids) == 6
    await check_quiet(engine, usage)
