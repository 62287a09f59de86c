"""A row's output depends on its request alone: not on neighbours, arrival, preemption, chunking or the prefix cache."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from peftmux.runtime.engine.api import GenerationRequest
from peftmux.runtime.engine.local import LocalEngine
from peftmux.runtime.params import SamplingParams
from peftmux.runtime.scheduler.row import Row
from tests.engine.harness import Answer, ask, check_quiet, load, request, running, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

ADAPTERS = ["", "lora", "lora_dora", "lora_rank_alpha_pattern", "prefix", "prefix_projection"]
BLOCK_BYTES = 4 * 3 * 2 * (8 + 8) * 4
"""block size x layers x kv heads x (key + value) x float32"""
BLOCKS = 1 + 2 * 2 + 14
"""The null block, two prefixes of 5 tokens, and no more than one row of the largest size can hold."""
OPENINGS: tuple[list[int], ...] = ([], [7] * 8, [1, 44, 48, 90, 66, 9, 10, 41, 92, 60, 11, 12])


@dataclass(slots=True)
class Pair:
    """`roomy` runs one row at a time; `tight` has little cache, small steps and every kind of sharing."""

    roomy: LocalEngine
    tight: LocalEngine
    preempted: int = 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair() -> AsyncIterator[Pair]:
    memory = BLOCKS * BLOCK_BYTES
    async with (
        running(prefix_caching=False) as roomy,
        running(block_size=4, kv_cache_memory=memory, max_batch_tokens=11) as tight,
    ):
        pair = Pair(roomy, tight)
        scheduler = tight._core.scheduler
        preempt = scheduler._preempt

        def counted(row: Row) -> None:
            pair.preempted += 1
            preempt(row)

        scheduler._preempt = counted  # type: ignore[method-assign]
        for name in ADAPTERS[1:]:
            await load(roomy, name)
            await load(tight, name)
        usage = tight.stats().kv_cache_usage
        yield pair
        assert pair.preempted > 5, "the cache was not small enough to prove anything"
        await check_quiet(tight, usage)


samplings = st.one_of(
    st.just(SamplingParams(temperature=0.0)),
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.3, 1.0, 3.0]),
        top_p=st.sampled_from([1.0, 0.7]),
        top_k=st.sampled_from([0, 5]),
        min_p=st.sampled_from([0.0, 0.05]),
        seed=st.integers(0, 2**64 - 1),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        frequency_penalty=st.sampled_from([0.0, 0.5]),
        logit_bias=st.sampled_from([{}, {5: 2.0}]),
    ),
)
rows = st.builds(
    lambda opening, rest, adapter, new, sampling, priority, prompt_logprobs: request(
        [*opening, *rest],
        adapter,
        new,
        sampling=sampling,
        priority=priority,
        prompt_logprobs=prompt_logprobs,
    ),
    st.sampled_from(OPENINGS),
    st.lists(st.integers(3, 95), min_size=1, max_size=10),
    st.sampled_from(ADAPTERS),
    st.sampled_from([1, 2, 9, 30]),
    samplings,
    st.integers(-1, 1),
    st.sampled_from([None, None, 0]),
)
arrivals = st.integers(0, 3)
"""A row comes when the one before it has this many tokens."""


async def arriving(engine: LocalEngine, wanted: Sequence[tuple[GenerationRequest, int]]) -> list[Answer]:
    answers = [Answer() for _ in wanted]
    reached = [asyncio.Event() for _ in wanted]

    async def one(i: int) -> None:
        if i and wanted[i][1]:
            await reached[i - 1].wait()
        async for delta in engine.generate(wanted[i][0]):
            answers[i].add(delta)
            following = wanted[i + 1][1] if i + 1 < len(wanted) else 0
            if len(answers[i].ids) >= following:
                reached[i].set()
        reached[i].set()

    await asyncio.gather(*(one(i) for i in range(len(wanted))))
    return answers


def check_same(got: Answer, alone: Answer) -> None:
    assert got.ids == alone.ids
    assert got.finish == alone.finish
    assert got.values == pytest.approx(alone.values, abs=1e-4)
    assert [e.token_id for e in got.prompt_logprobs] == [e.token_id for e in alone.prompt_logprobs]
    for mine, its in zip(got.prompt_logprobs, alone.prompt_logprobs, strict=True):
        assert mine.logprob == (None if its.logprob is None else pytest.approx(its.logprob, abs=1e-4))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(wanted=st.lists(st.tuples(rows, arrivals), min_size=2, max_size=9))
async def test_a_row_is_what_it_is_alone(pair: Pair, wanted: list[tuple[GenerationRequest, int]]) -> None:
    together = await arriving(pair.tight, wanted)
    for got, (one, _) in zip(together, wanted, strict=True):
        check_same(got, await ask(pair.roomy, one))


async def test_preempted_rows_are_what_they_are_alone(pair: Pair) -> None:
    before = pair.preempted
    sampled = partial(SamplingParams, temperature=1.0)
    wanted = [
        request([3 + i, *range(30, 40)], name, 24, sampling=sampled(seed=i) if i % 2 else None)
        for i, name in enumerate(ADAPTERS)
    ]
    together = await arriving(pair.tight, [(one, 1) for one in wanted])
    assert pair.preempted > before
    for got, one in zip(together, wanted, strict=True):
        check_same(got, await ask(pair.roomy, one))


async def test_a_prefix_that_comes_takes_blocks_from_rows_and_nothing_else(pair: Pair) -> None:
    """Its two blocks, while three rows of up to 9 share 14."""
    wanted = [request([3 + i, *range(30, 40)], name, 24) for i, name in enumerate(["", "lora", "prefix"])]
    running = asyncio.create_task(arriving(pair.tight, [(one, 0) for one in wanted]))
    await until(lambda: pair.tight.stats().running == 3)
    late = await load(pair.tight, "prefix", "late")
    answer = await ask(pair.tight, request([5, 6, 7], "late"))
    for got, one in zip(await running, wanted, strict=True):
        check_same(got, await ask(pair.roomy, one))
    assert answer.ids == (await ask(pair.roomy, request([5, 6, 7], "prefix"))).ids
    assert (await pair.tight.unload_adapter("late")).revision == late.revision


async def test_a_seed_draws_the_same_in_any_company(pair: Pair) -> None:
    """And another seed draws something else, so that equality means something."""
    wanted = [request([9, 8, 7], "lora", 12, sampling=SamplingParams(seed=seed)) for seed in (1, 2, 1, 3)]
    first, other, again, _ = await arriving(pair.tight, [(one, 0) for one in wanted])
    assert first.ids == again.ids == (await ask(pair.roomy, wanted[0])).ids
    assert first.ids != other.ids
