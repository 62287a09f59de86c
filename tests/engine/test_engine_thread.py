"""Calls to the engine's thread that their callers leave, and calls that fail as it ends."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from typing import Any

import pytest
import torch

from peftmux.kernels.lowrank.workspace import workspace
from peftmux.runtime.errors import EngineDead
from tests.engine.harness import StepGate, ask, in_engine_thread, request, running, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = [1, 44, 48, 90, 66]


async def test_a_call_that_is_cancelled_before_its_turn_is_not_made() -> None:
    made: list[int] = []
    async with running() as engine:
        release = threading.Event()
        engine._thread.post(lambda: release.wait(20))
        calls = [asyncio.wrap_future(engine._thread.ask(partial(made.append, i))) for i in range(3)]
        for call in calls[:2]:
            call.cancel()
        await asyncio.sleep(0)
        release.set()
        async with asyncio.timeout(10):
            await calls[2]
        assert made == [2]
        assert engine.stats().healthy
        assert len((await ask(engine, request(PROMPT))).ids) == 6


async def test_a_call_that_is_cancelled_while_it_is_made_is_made() -> None:
    async with running() as engine:
        begun, release = threading.Event(), threading.Event()

        def slow() -> None:
            begun.set()
            release.wait(20)

        call = asyncio.wrap_future(engine._thread.ask(slow))
        await until(begun.is_set)
        call.cancel()
        await asyncio.sleep(0)
        release.set()
        async with asyncio.timeout(10):
            assert await in_engine_thread(engine, lambda: 7) == 7
        assert engine.stats().healthy


async def test_calls_that_fail_while_the_engine_ends_leave_nobody_waiting() -> None:
    async with running() as engine:
        gate = StepGate(engine)
        gate.hold()
        task = asyncio.create_task(ask(engine, request(PROMPT, max_tokens=100)))
        await gate.step_begins()
        for _ in range(3):
            engine._thread.post(_fail)
        call: asyncio.Future[Any] = asyncio.wrap_future(engine._thread.ask(lambda: 7))
        gate.release()
        async with asyncio.timeout(10):
            assert await call == 7
            with pytest.raises(EngineDead):
                await task


async def test_an_engine_that_ends_gives_back_its_kernels_memory() -> None:
    space = workspace("cpu")

    def take() -> int:
        space.buffers(3, 1, torch.float32)
        return threading.get_ident()

    async with running() as engine:
        thread = await in_engine_thread(engine, take)
        assert [key for key in space._local if key[0] == thread]
    assert not [key for key in space._local if key[0] == thread]


def _fail() -> None:
    raise RuntimeError("a bug in the engine")
