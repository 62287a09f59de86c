"""Replayed decode steps, without a GPU: when they are taken, and that they give an ordinary step's bits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import pytest_asyncio
import torch
from torch import Tensor

from peftmux.runtime.engine import factory
from peftmux.runtime.engine.local import LocalEngine
from peftmux.runtime.engine.observer import NullObserver
from peftmux.runtime.model.first_pass import FirstPass
from peftmux.runtime.model.graphs import DecodeGraphs, replayable, rerun
from peftmux.runtime.model.loaded import LoadedModel
from peftmux.runtime.model.tables import HostOperators
from peftmux.runtime.params import ImagePatches, OutputOptions, Readout, SamplingParams
from peftmux.runtime.scheduler import History
from peftmux.runtime.scheduler.plan import ImageSpan, RowPlan
from tests.engine.harness import Answer, ask, ask_all, check_quiet, load, request, running, until

KINDS = ["lora", "lora_dora", "ia3", "prefix", "lora_embed", "ln_tuning", "shira"]
PROMPT = [1, 44, 48, 90, 66, 9, 10, 41]


def decoding(**changes: Any) -> RowPlan:
    """The seventh token of a row in blocks of 4."""
    row = RowPlan(
        row=1,
        slot=0,
        tokens=(5,),
        start=6,
        position_offset=0,
        blocks=(1, 2),
        samples=True,
        generated=2,
        sampling=SamplingParams(temperature=0.0),
        output=OutputOptions(),
        prompt_logprobs_from=1,
        next_tokens=(),
        suppressed=(),
        history=None,
    )
    return replace(row, **changes)


class TestWhichStepsAreTaken:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"slot": 3},
            {"start": 40, "active_from": 3, "slot": 3},
            pytest.param({"history": History((1, 2))}, id="history"),
            {"suppressed": (2,)},
        ],
        ids=str,
    )
    def test_decode_of_any_adapter_in_tables(self, changes):
        assert replayable([decoding(), decoding(**changes)], 2, {7})

    @pytest.mark.parametrize(
        "changes",
        [
            {"slot": 7},
            {"tokens": (5, 6)},
            {"samples": False},
            {"tokens": (-1,)},
            {"readout": Readout.LAST},
            {"readout": Readout.LAST, "samples": False},
            {"next_tokens": (8,), "prompt_logprobs_from": 0},
            {"images": (ImageSpan(6, 7, (ImagePatches(1, 1, b""),), False),)},
        ],
        ids=str,
    )
    def test_one_row_that_needs_more_keeps_all_out(self, changes):
        assert not replayable([decoding(), decoding(**changes)], 2, {7})

    def test_more_rows_than_the_largest_bucket(self):
        assert not replayable([decoding()] * 3, 2, ())


class Moving(HostOperators):
    """Operators whose addresses change, and that serve only what they are told to."""

    place = 0
    refused: frozenset[int] = frozenset()

    def serves(self, site):
        return super().serves(site) and id(site) not in self.refused

    def generation(self):
        return self.place


@dataclass
class Recorder:
    """Stands for a model: remembers the step that each forward reads."""

    seen: list[Any] = field(default_factory=list)

    def __call__(self, inputs):
        self.seen.append(inputs)
        return torch.zeros(inputs.ids.shape[1], 3)


class Cache:
    def slot(self, blocks, position):
        return blocks[position // 4] * 4 + position % 4


@pytest.fixture
def made():
    """Graphs of at most 5 rows over a recorded forward, and a count of failures."""

    def build(capture=rerun, max_rows=5):
        forward, failures = Recorder(), []
        graphs = DecodeGraphs(
            forward, torch.device("cpu"), max_rows, Moving(torch.device("cpu")), capture, lambda: failures.append(1)
        )
        return graphs, forward, failures

    yield build
    Moving.place, Moving.refused = 0, frozenset()


def test_a_step_fills_up_its_bucket_with_the_null_block(made):
    graphs, forward, _ = made()
    rows = [decoding(), decoding(row=2, start=5, position_offset=3, blocks=(4, 3), tokens=(9,)), decoding(row=3)]
    assert graphs.run(rows, Cache(), None).shape == (3, 3)
    (inputs,) = forward.seen
    assert inputs.ids.tolist() == [[5, 9, 5, 0]]
    assert inputs.positions.tolist() == [[6, 8, 6, 0]]
    assert inputs.slots.tolist() == [2 * 4 + 2, 3 * 4 + 1, 2 * 4 + 2, 0]
    assert inputs.keep.tolist() == [0, 1, 2, 3]
    assert (inputs.rows.query_lens, inputs.rows.context_lens) == ((1, 1, 1), (7, 6, 7))


def test_inputs_stay_where_they_are(made):
    graphs, forward, _ = made()
    for start in (6, 5):
        graphs.run([decoding(start=start)], Cache(), None)
    first, second = forward.seen
    assert second.positions.tolist() == [[5]]
    for name in ("ids", "positions", "slots", "keep"):
        assert getattr(first, name).data_ptr() == getattr(second, name).data_ptr()


def test_adapters_come_and_go_without_a_capture_where_some_have_been(made):
    graphs, forward, _ = made()
    here, there = object(), object()
    row = decoding(slot=1)
    graphs.placed(1, [here])
    graphs.run([row], Cache(), None)
    assert graphs.captures == 1
    graphs.placed(2, [here])
    graphs.removed(1, [here])
    graphs.run([decoding(slot=2)], Cache(), None)
    assert graphs.captures == 1
    graphs.placed(1, [there])
    graphs.run([row], Cache(), None)
    assert graphs.captures == 2, "the new site is not in the old graph"
    graphs.removed(1, [there])
    graphs.run([decoding(slot=2)], Cache(), None)
    assert graphs.captures == 2, "a site that is in the graph may be empty"
    assert forward.seen[-1].segments.runs == ((2, 0, 1),)


def test_steps_of_the_base_alone_have_a_graph_without_adapters(made):
    graphs, forward, _ = made()
    graphs.placed(1, [object()])
    graphs.run([decoding(slot=1)], Cache(), None)
    graphs.run([decoding()], Cache(), None)
    assert (graphs.captures, forward.seen[-1].segments.runs) == (2, ())
    graphs.run([decoding(slot=1, active_from=9)], Cache(), None)
    assert (graphs.captures, forward.seen[-1].segments.runs) == (2, ())


def test_what_has_moved_is_captured_anew(made):
    graphs, _, _ = made()
    graphs.placed(1, [object()])
    for row in (decoding(), decoding(slot=1)):
        graphs.run([row], Cache(), None)
    Moving.place = 1
    for _ in range(2):
        graphs.run([decoding(slot=1)], Cache(), None)
    assert graphs.captures == 3
    graphs.run([decoding()], Cache(), None)
    assert graphs.captures == 3, "the base alone reads no table"


def test_adapters_outside_the_tables_run_as_they_come(made):
    graphs, _, _ = made()
    inside, outside = object(), object()
    Moving.refused = frozenset({id(outside)})
    graphs.placed(1, [inside])
    graphs.placed(2, [inside, outside])
    assert graphs.takes([decoding(slot=1), decoding()])
    assert not graphs.takes([decoding(slot=1), decoding(slot=2)])
    graphs.removed(2, [inside, outside])
    graphs.placed(2, [inside])
    assert graphs.takes([decoding(slot=2)])
    graphs.placed(3, [FirstPass(torch.device("cpu"))])
    assert not graphs.takes([decoding(slot=3)]), "what a first pass sees is no input of a graph"


def test_a_site_that_only_others_held_is_not_in_the_graph(made):
    """A branch with a fusion, say: its own kernel is not launched there until a bottleneck comes."""
    graphs, _, _ = made()
    site, elsewhere, never = object(), object(), object()
    Moving.refused = frozenset({id(never)})
    graphs.placed(1, [elsewhere])
    graphs.placed(2, [site, never])
    graphs.run([decoding(slot=1)], Cache(), None)
    graphs.removed(2, [site, never])
    graphs.placed(3, [site])
    graphs.run([decoding(slot=3)], Cache(), None)
    assert graphs.captures == 2


def test_a_failed_capture_is_said_once_and_the_step_runs(made, caplog):
    def failing(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs, forward, failures = made(failing)
    with caplog.at_level(logging.WARNING):
        assert graphs.run([decoding()], Cache(), None).shape == (1, 3)
        assert not graphs.takes([decoding()])
        graphs.warm_up()
    assert len(forward.seen) == len(failures) == len(caplog.records) == 1
    assert "run as they come" in caplog.text


def test_warm_up_captures_every_bucket(made):
    graphs, _, _ = made(max_rows=5)
    graphs.warm_up()
    assert graphs.captures == 4
    graphs.run([decoding()] * 5, Cache(), None)
    assert graphs.captures == 4
    graphs.placed(1, [object()])
    graphs.warm_up()
    assert graphs.captures == 8


@asynccontextmanager
async def replaying(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> AsyncIterator[LocalEngine]:
    """An engine on the CPU that runs its decode steps out of buckets, as a GPU's would."""

    def graphs(model: LoadedModel, max_rows: int, *_: Any) -> DecodeGraphs:
        return DecodeGraphs(model.forward, model.device, max_rows, HostOperators(model.device), rerun, print)

    monkeypatch.setattr(factory, "decode_graphs", graphs)
    async with running(**settings) as engine:
        yield engine


def taken(engine: LocalEngine) -> list[int]:
    """Rows of every replayed step from now on."""
    graphs = engine._core._runner.graphs
    assert graphs is not None
    rows: list[int] = []
    run = graphs.run

    def counted(plans: Any, *rest: Any) -> Tensor:
        rows.append(len(plans))
        return run(plans, *rest)

    graphs.run = counted  # type: ignore[method-assign, assignment]
    return rows


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair() -> AsyncIterator[tuple[LocalEngine, LocalEngine]]:
    """An ordinary engine and one that replays, with the same adapters."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        async with replaying(monkeypatch, block_size=4) as replayed:
            monkeypatch.undo()
            async with running(block_size=4) as plain:
                for name in KINDS[:4]:
                    await load(plain, name)
                    await load(replayed, name)
                yield plain, replayed


def same(one: list[Answer], other: list[Answer]) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a.ids, a.logprobs) == (b.ids, b.logprobs)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 9, 17])
async def test_every_bucket_gives_the_same_bits(pair, rows):
    plain, replayed = pair
    sampling = SamplingParams(temperature=0.8, top_p=0.9, seed=3, repetition_penalty=1.2)
    wanted = [
        request(
            [*PROMPT[: 2 + i % 6], 20 + i],
            ("", *KINDS[:4])[i % 5],
            5 + i % 3,
            logprobs=2,
            sampling=sampling if i % 3 == 2 else None,
        )
        for i in range(rows)
    ]
    steps = taken(replayed)
    same(await ask_all(plain, wanted), await ask_all(replayed, wanted))
    assert max(steps) == rows
    assert len(steps) >= 4


@pytest.mark.asyncio(loop_scope="module")
async def test_adapters_of_every_kind_come_and_go_between_replays(pair):
    plain, replayed = pair
    long = request(PROMPT, "lora", 40)
    expected = await ask(plain, long)
    steps = taken(replayed)

    async def storm() -> None:
        for name in KINDS[4:]:
            for engine in pair:
                await load(engine, name, f"{name}-again")
            wanted = [request(PROMPT, f"{name}-again", 6), request(PROMPT[:5], "", 6)]
            same(await ask_all(plain, wanted), await ask_all(replayed, wanted))
            for engine in pair:
                await engine.unload_adapter(f"{name}-again")

    answer, _ = await asyncio.gather(ask(replayed, long), storm())
    same([expected], [answer])
    assert len(steps) > 30
    await check_quiet(replayed, replayed.stats().kv_cache_usage)


@pytest.mark.asyncio
async def test_preempted_rows_give_the_same_bits(monkeypatch):
    """Cache for little more than one row of the largest size."""
    memory = (1 + 16) * 4 * 3 * 2 * (8 + 8) * 4
    wanted = [request([*PROMPT, 30 + i], "lora" if i % 2 else "", 20) for i in range(5)]
    async with running(prefix_caching=False) as plain:
        await load(plain, "lora")
        expected = await ask_all(plain, wanted)
    async with replaying(monkeypatch, block_size=4, kv_cache_memory=memory) as tight:
        await load(tight, "lora")
        scheduler = tight._core.scheduler
        preempted = []
        preempt = scheduler._preempt
        scheduler._preempt = lambda row: preempted.append(row) or preempt(row)  # type: ignore[func-returns-value, method-assign]
        steps = taken(tight)
        got = await ask_all(tight, wanted)
        assert preempted
        assert steps
    for a, b in zip(expected, got, strict=True):
        assert a.ids == b.ids
        assert a.values == pytest.approx(b.values, abs=1e-5)


@pytest.mark.asyncio
async def test_an_engine_whose_capture_fails_serves_and_says_so(monkeypatch):
    class Observer(NullObserver):
        failures = 0

        def graphs_failed(self) -> None:
            self.failures += 1

    def failing(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("not permitted")

    def graphs(model: LoadedModel, max_rows: int, *_: Any) -> DecodeGraphs:
        return DecodeGraphs(
            model.forward, model.device, max_rows, HostOperators(model.device), failing, observer.graphs_failed
        )

    async with running() as plain:
        expected = await ask(plain, request(PROMPT))
    observer = Observer()
    monkeypatch.setattr(factory, "decode_graphs", graphs)
    async with running(observer=observer) as engine:
        await until(lambda: observer.failures == 1)
        answer = await ask(engine, request(PROMPT))
    assert answer.ids == expected.ids
    assert observer.failures == 1
