"""An engine that launches a step before it has the last one's result: the same answers, and nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from peftmux.runtime.engine import factory
from peftmux.runtime.engine.api import EmbeddingRequest
from peftmux.runtime.engine.local import LocalEngine
from peftmux.runtime.errors import StepFailed
from peftmux.runtime.model.graphs import DecodeGraphs, rerun
from peftmux.runtime.model.tables import HostOperators
from peftmux.runtime.params import FinishReason, SamplingParams
from tests.engine.harness import StepGate, ask, ask_all, check_quiet, load, opened, request, running, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = [1, 44, 48, 90, 66, 9, 10, 41]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plain() -> AsyncIterator[LocalEngine]:
    async with running(block_size=4) as engine:
        for name in ("lora", "prefix"):
            await load(engine, name)
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["eager", "replayed"])
async def ahead(request: pytest.FixtureRequest) -> AsyncIterator[LocalEngine]:
    """With few blocks, so that rows are preempted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "_runs_ahead", lambda model: True)
        if request.param == "replayed":
            patch.setattr(
                factory,
                "decode_graphs",
                lambda model, rows, *_: DecodeGraphs(
                    model.forward, model.device, rows, HostOperators(model.device), rerun, print
                ),
            )
        memory = 40 * 4 * 3 * 2 * (8 + 8) * 4
        async with running(block_size=4, max_rows=6, kv_cache_memory=memory) as engine:
            for name in ("lora", "prefix"):
                await load(engine, name)
            usage = engine.stats().kv_cache_usage
            yield engine
            await check_quiet(engine, usage)


@pytest.fixture
def gate(ahead: LocalEngine) -> Any:
    gate = StepGate(ahead)
    yield gate
    gate.remove()


async def test_the_same_answers(plain, ahead):
    drawn = SamplingParams(temperature=0.9, top_k=12, seed=8)
    wanted = [
        request([*PROMPT, i], ("", "lora", "prefix")[i % 3], 4 + i, sampling=drawn if i % 2 else None, logprobs=1)
        for i in range(9)
    ]
    alone = [await ask(plain, one) for one in wanted]
    together = await ask_all(ahead, wanted)
    assert [a.ids for a in together] == [a.ids for a in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.values == pytest.approx(other.values, abs=1e-5)


async def test_rows_that_need_their_tokens_at_once_are_answered_as_well(plain, ahead):
    penalised = SamplingParams(temperature=0.7, seed=2, repetition_penalty=1.4, frequency_penalty=0.3)
    wanted = [
        request(PROMPT, "lora", 9, sampling=penalised),
        request(PROMPT, "", 9),
        request(PROMPT[:5], "prefix", 5, prompt_logprobs=1),
    ]
    alone = [await ask(plain, one) for one in wanted]
    together = await ask_all(ahead, wanted)
    assert [a.ids for a in together] == [a.ids for a in alone]
    assert [e.token_id for e in together[2].prompt_logprobs] == PROMPT[:5]
    embedding = EmbeddingRequest(tuple(PROMPT))
    both = await asyncio.gather(ahead.embed(embedding), ask(ahead, wanted[1]))
    assert both[0].values == pytest.approx((await plain.embed(embedding)).values, abs=1e-6)
    assert both[1].ids == alone[1].ids


async def test_a_row_that_ends_by_surprise_gives_no_token_too_many(plain, ahead):
    free = await ask(plain, request(PROMPT, "lora", 12))
    at = next(i for i, token in enumerate(free.ids) if token not in free.ids[:i] and i > 1)
    wanted = request(PROMPT, "lora", 12, stop_token_ids=(free.ids[at],))
    other = request(PROMPT, "", 12)
    stopped, whole = await ask_all(ahead, [wanted, other])
    assert stopped.ids == free.ids[: at + 1]
    assert stopped.finish is FinishReason.STOP
    assert whole.ids == (await ask(plain, other)).ids


async def test_a_cancelled_row_leaves_nothing_behind(ahead, gate):
    async with opened(ahead, request(PROMPT, "lora", 60)) as stream:
        async for _ in stream:
            break
    answer = await ask(ahead, request(PROMPT, "lora", 3))
    assert len(answer.ids) == 3
    await until(lambda: ahead.stats().running == 0)


async def test_a_step_that_fails_ends_its_rows_and_no_others(plain, ahead, gate):
    """At its launch, with the step before it still to be taken."""
    expected = await ask(plain, request(PROMPT, "lora", 6))
    gate.hold()
    failing = asyncio.create_task(ask(ahead, request(PROMPT, "", 30)))
    await gate.step_begins()
    gate.failures.append(RuntimeError("out of memory"))
    gate.release()
    with pytest.raises(StepFailed):
        await failing
    assert (await ask(ahead, request(PROMPT, "lora", 6))).ids == expected.ids


async def test_a_result_that_never_comes_ends_its_rows_and_no_others(plain, ahead, monkeypatch):
    runner = ahead._core._runner
    launch = runner.launch
    broken = []

    def lost(plan: Any, before: Any = None) -> Any:
        launched = launch(plan, before)
        if not broken and len(plan.rows[0].tokens) == 1:
            broken.append(plan)
            launched.result = _raise  # type: ignore[method-assign]
        return launched

    monkeypatch.setattr(runner, "launch", lost)
    with pytest.raises(StepFailed):
        await ask(ahead, request(PROMPT, "", 30))
    assert broken
    expected = await ask(plain, request(PROMPT, "lora", 6))
    assert (await ask(ahead, request(PROMPT, "lora", 6))).ids == expected.ids


def _raise() -> Any:
    raise RuntimeError("an illegal memory access was encountered")


async def test_adapters_come_and_go_beside_a_step_that_is_still_out(plain, ahead):
    long = request(PROMPT, "lora", 40)
    expected = await ask(plain, long)

    async def storm() -> None:
        for i in range(6):
            await load(ahead, "lora_dora", f"passing-{i}")
            await ask(ahead, request(PROMPT, f"passing-{i}", 3))
            await ahead.unload_adapter(f"passing-{i}")

    answer, _ = await asyncio.gather(ask(ahead, long), storm())
    assert answer.ids == expected.ids


async def test_steps_overlap(ahead):
    """The second step is launched before the first one's result is taken."""
    runner = ahead._core._runner
    launch = runner.launch
    order: list[str] = []

    def noted(plan: Any, before: Any = None) -> Any:
        order.append("launch")
        launched = launch(plan, before)
        result = launched.result

        def taken() -> Any:
            order.append("take")
            return result()

        launched.result = taken  # type: ignore[method-assign]
        return launched

    runner.launch = noted  # type: ignore[method-assign]
    await ask(ahead, request(PROMPT, "", 4))
    runner.launch = launch  # type: ignore[method-assign]
    assert order == ["launch", "launch", "take", "launch", "take", "launch", "take", "take"]
