"""Adapters come, change and go while requests run: who gets which revision, what each call answers, what is freed."""

from __future__ import annotations

import asyncio
import random
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from peftmux.adapters.errors import AdapterInvalid, SourceForbidden, SourceNotFound
from peftmux.runtime.engine.api import AdapterState
from peftmux.runtime.engine.local import LocalEngine
from peftmux.runtime.errors import (
    AdapterExists,
    AdapterLoading,
    AdapterMemoryExhausted,
    AdapterNotFound,
    Draining,
    InvalidRequest,
)
from peftmux.runtime.model import cache
from tests.engine.harness import (
    StepGate,
    adapters,
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

PROMPT = [1, 44, 48, 90, 66, 9, 10]
SOURCES = {"v1": "lora", "v1_copy": "lora", "v2": "lora_pissa", "dora": "lora_dora", "prefix": "prefix"}


@dataclass(slots=True)
class World:
    """An engine without adapters, the root it loads from, and what each source's adapter answers to PROMPT."""

    engine: LocalEngine
    answers: dict[str, list[int]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for name, source in SOURCES.items():
        shutil.copytree(Path(adapters(), source), root / name)
    shutil.copytree(root / "v1", root / "broken")
    (root / "broken" / "adapter_model.safetensors").write_bytes(b"no tensors here")
    return root


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(root: Path) -> AsyncIterator[World]:
    async with running(adapters_root=str(root), block_size=4) as engine:
        world = World(engine)
        for source in SOURCES:
            world.revisions[source] = (await load(engine, source)).revision
            world.answers[source] = (await ask(engine, request(PROMPT, source, 24))).ids
            await engine.unload_adapter(source)
        assert len({tuple(ids) for ids in world.answers.values()}) == len(SOURCES) - 1
        yield world


@pytest_asyncio.fixture(loop_scope="module")
async def world(shared: World) -> AsyncIterator[World]:
    """As it was before any adapter came, and so again after each test."""
    engine = shared.engine
    await check_gone(engine)
    yield shared
    for info in engine.list_adapters():
        await asyncio.wait_for(engine.unload_adapter(info.name), 20)
    await check_gone(engine)


@pytest.fixture
def gate(world: World) -> Iterator[StepGate]:
    gate = StepGate(world.engine)
    yield gate
    gate.remove()


class LoaderGate:
    """Holds the loader's threads before they read anything."""

    def __init__(self, engine: LocalEngine) -> None:
        self._loader = engine._adapters._loader
        self._load = self._loader._load
        self._open = threading.Event()
        self.waiting = 0
        self._loader._load = self._gated  # type: ignore[method-assign]

    def _gated(self, folder: Path) -> Any:
        if folder.name == "v1":
            self.waiting += 1
            self._open.wait(30)
        return self._load(folder)

    def release(self) -> None:
        self._open.set()


@pytest.fixture
def slow_v1(world: World) -> Iterator[LoaderGate]:
    """Loads of the folder v1 wait."""
    gate = LoaderGate(world.engine)
    yield gate
    gate.release()
    gate._loader._load = gate._load  # type: ignore[method-assign]


async def check_gone(engine: LocalEngine) -> None:
    """No adapter, and all that adapters held is given back: bytes, slots, blocks."""
    await check_quiet(engine)
    placement = engine._adapters._placement
    slots = await in_engine_thread(engine, lambda: sorted(placement._free))
    assert engine.list_adapters() == ()
    assert placement.bytes == 0
    assert slots == list(range(1, placement._next))
    assert all(ref.group.lowrank.empty for ref in engine._core._runner.model.sites.values())


async def test_what_a_load_says(world: World) -> None:
    info = await load(world.engine, "v2", "a", pinned=True)
    assert (info.name, info.state, info.kind, info.source) == ("a", AdapterState.READY, "lora", "v2")
    assert (info.revision, info.pinned) == (world.revisions["v2"], True)
    assert (info.min_rank, info.max_rank) == (8, 8)
    assert (info.applied_sites, info.tensors) == (21, 42)
    assert info.bytes == world.engine._adapters._placement.bytes > 0
    assert 0 < info.load_seconds < 10
    assert world.engine.get_adapter("a") == info
    assert world.engine.list_adapters() == (info,)


@pytest.mark.parametrize("source", ["v1", "v1_copy"])
@pytest.mark.parametrize("replace", [False, True])
async def test_the_same_content_again_changes_nothing(world: World, source: str, replace: bool) -> None:
    first = await load(world.engine, "v1", "a")
    again = await load(world.engine, source, "a", replace=replace, pinned=True)
    assert again == first == world.engine.get_adapter("a")


async def test_other_content_needs_replace(world: World) -> None:
    first = await load(world.engine, "v1", "a")
    for wait in (True, False):
        with pytest.raises(AdapterExists, match=world.revisions["v2"]):
            await load(world.engine, "v2", "a", wait=wait)
    assert world.engine.get_adapter("a") == first
    assert (await ask(world.engine, request(PROMPT, "a", 24))).ids == world.answers["v1"]


@pytest.mark.parametrize(("first", "second"), [("v1", "v2"), ("v1", "prefix"), ("prefix", "dora")])
@pytest.mark.parametrize("wait", [True, False])
async def test_replaced_while_in_use(world: World, gate: StepGate, first: str, second: str, wait: bool) -> None:
    engine = world.engine
    await load(engine, first, "a")
    async with opened(engine, request(PROMPT, "a", 24)) as stream:
        deltas = [await anext(stream)]
        await load(engine, second, "a", replace=True, wait=wait)
        await until(lambda: engine.get_adapter("a").revision == world.revisions[second])
        fresh = await ask(engine, request(PROMPT, "a", 24))
        deltas += [delta async for delta in stream]
    assert (fresh.ids, fresh.revision) == (world.answers[second], world.revisions[second])
    assert [token for delta in deltas for token in delta.token_ids] == world.answers[first]
    assert {delta.adapter_revision for delta in deltas} == {world.revisions[first]}
    with pytest.raises(AdapterNotFound):
        await ask(engine, request(PROMPT, f"a@{world.revisions[first]}"))
    await in_engine_thread(engine, lambda: None)
    assert engine._adapters._placement.bytes == engine.get_adapter("a").bytes


@pytest.mark.parametrize("wait", [True, False])
async def test_a_failed_replacement_leaves_the_old_one(world: World, wait: bool) -> None:
    engine = world.engine
    first = await load(engine, "v1", "a")
    if wait:
        with pytest.raises(AdapterInvalid):
            await load(engine, "broken", "a", replace=True)
    else:
        await load(engine, "broken", "a", replace=True, wait=False)
        await until(lambda: bool(engine.get_adapter("a").error))
    after = engine.get_adapter("a")
    assert (after.state, after.revision, after.source) == (AdapterState.READY, first.revision, "v1")
    assert (await ask(engine, request(PROMPT, "a", 24))).ids == world.answers["v1"]
    assert (await load(engine, "v2", "a", replace=True)).error == ""


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("broken", AdapterInvalid),
        ("nothing_here", SourceNotFound),
        ("../v1", SourceForbidden),
        ("/etc", SourceForbidden),
    ],
)
async def test_a_failed_first_load_leaves_no_name(world: World, source: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        await load(world.engine, source, "a")
    with pytest.raises(AdapterNotFound):
        world.engine.get_adapter("a")


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b/c", "a@b", "ä", "a" * 129, "../a"])
async def test_bad_names_are_refused(world: World, name: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await world.engine.load_adapter(name, "v1")
    assert refusal.value.field == "name"


async def test_another_revision_than_the_wanted_one_is_refused(world: World) -> None:
    with pytest.raises(AdapterInvalid, match=world.revisions["v1"]):
        await load(world.engine, "v1", "a", revision=world.revisions["v2"])
    assert (await load(world.engine, "v1", "a", revision=world.revisions["v1"])).state is AdapterState.READY


async def test_without_wait_the_load_is_seen_under_way(world: World, slow_v1: LoaderGate) -> None:
    engine = world.engine
    info = await load(engine, "v1", "a", wait=False)
    assert info.state is engine.get_adapter("a").state is AdapterState.LOADING
    with pytest.raises(AdapterLoading) as refusal:
        await ask(engine, request(PROMPT, "a"))
    assert refusal.value.retry_after
    slow_v1.release()
    await until(lambda: engine.get_adapter("a").state is AdapterState.READY)
    assert (await ask(engine, request(PROMPT, "a", 24))).ids == world.answers["v1"]


async def test_without_wait_a_failure_stays_in_sight(world: World) -> None:
    engine = world.engine
    for _ in range(2):
        assert (await load(engine, "broken", "a", wait=False)).state is AdapterState.LOADING
        await until(lambda: engine.get_adapter("a").state is AdapterState.FAILED)
        assert engine.get_adapter("a").error
        with pytest.raises(AdapterNotFound, match="failed to load"):
            await ask(engine, request(PROMPT, "a"))
    assert (await load(engine, "v1", "a")).state is AdapterState.READY
    await load(engine, "broken", "b", wait=False)
    await until(lambda: engine.get_adapter("b").state is AdapterState.FAILED)
    assert (await engine.unload_adapter("b")).state is AdapterState.UNLOADED
    assert [info.name for info in engine.list_adapters()] == ["a"]


async def test_unload_lets_requests_finish(world: World, gate: StepGate) -> None:
    engine = world.engine
    await load(engine, "prefix", "a")
    async with opened(engine, request(PROMPT, "a", 24)) as stream:
        ids = list((await anext(stream)).token_ids)
        gate.hold()
        unload = asyncio.create_task(engine.unload_adapter("a"))
        await until(lambda: engine.get_adapter("a").state is AdapterState.DRAINING)
        assert engine.get_adapter("a").requests_in_flight == 1
        with pytest.raises(Draining):
            await ask(engine, request(PROMPT, "a"))
        with pytest.raises(Draining):
            await load(engine, "v1", "a", wait=False, replace=True)
        assert not unload.done()
        gate.release()
        async for delta in stream:
            ids += delta.token_ids
    assert ids == world.answers["prefix"]
    info = await asyncio.wait_for(unload, 5)
    assert (info.state, info.bytes, info.residency) == (AdapterState.UNLOADED, 0, None)
    await check_gone(engine)


async def test_unload_without_wait(world: World, gate: StepGate) -> None:
    engine = world.engine
    await load(engine, "v1", "a")
    async with opened(engine, request(PROMPT, "a", 24)) as stream:
        await anext(stream)
        assert (await engine.unload_adapter("a", wait=False)).state is AdapterState.DRAINING
        assert (await engine.unload_adapter("a", wait=False)).state is AdapterState.DRAINING
        with pytest.raises(Draining):
            await load(engine, "v1", "a")
    await until(lambda: not engine.list_adapters())
    with pytest.raises(AdapterNotFound):
        await engine.unload_adapter("a", wait=False)


async def test_a_load_behind_an_unload_waits_for_it(world: World) -> None:
    engine = world.engine
    await load(engine, "v1", "a")
    async with opened(engine, request(PROMPT, "a", 24)) as stream:
        await anext(stream)
        unload = asyncio.create_task(engine.unload_adapter("a"))
        await asyncio.sleep(0.01)
        again = asyncio.create_task(load(engine, "v2", "a"))
        async for _ in stream:
            pass
    assert (await unload).state is AdapterState.UNLOADED
    assert (await again).revision == world.revisions["v2"]


async def test_a_caller_that_leaves_does_not_stop_the_work(world: World, slow_v1: LoaderGate) -> None:
    engine = world.engine
    leaving = asyncio.create_task(load(engine, "v1", "a"))
    await until(lambda: slow_v1.waiting == 1)
    leaving.cancel()
    follower = asyncio.create_task(load(engine, "v2", "a", replace=True))
    await asyncio.sleep(0.05)
    assert not follower.done(), "it did not wait for its turn"
    slow_v1.release()
    assert (await follower).revision == world.revisions["v2"]
    assert leaving.cancelled()


async def test_a_load_holds_up_neither_steps_nor_other_names(world: World, slow_v1: LoaderGate) -> None:
    engine = world.engine
    waiting = asyncio.create_task(load(engine, "v1", "a"))
    await until(lambda: slow_v1.waiting == 1)
    assert (await load(engine, "v2", "b")).state is AdapterState.READY
    answers = await ask_all(engine, [request(PROMPT, name, 24) for name in ("", "b")])
    assert answers[1].ids == world.answers["v2"]
    assert not waiting.done()
    slow_v1.release()
    await waiting


async def test_many_loads_of_one_name_place_it_once(world: World) -> None:
    engine = world.engine
    infos = await asyncio.gather(*(load(engine, "v1", "a") for _ in range(8)))
    assert len(set(infos)) == 1
    assert engine._adapters._placement.bytes == infos[0].bytes


async def test_the_memory_budget_holds(root: Path) -> None:
    async with running(adapters_root=str(root), adapter_memory=60_000) as engine:
        await load(engine, "v2", "a")
        await load(engine, "prefix", "c")
        with pytest.raises(AdapterMemoryExhausted, match="expected at most") as refusal:
            await load(engine, "v1", "b")
        assert refusal.value.retry_after
        assert [info.name for info in engine.list_adapters()] == ["a", "c"]
        await engine.unload_adapter("a")
        assert (await load(engine, "v1", "b")).bytes == 24_912
        with pytest.raises(AdapterMemoryExhausted):
            await load(engine, "v2", "b", replace=True)
        assert engine.get_adapter("b").source == "v1"


async def test_a_prefix_that_the_cache_cannot_hold_is_refused(root: Path) -> None:
    memory = 3 * 4 * 3 * 2 * 16 * 4
    async with running(adapters_root=str(root), block_size=4, kv_cache_memory=memory) as engine:
        with pytest.raises(AdapterMemoryExhausted, match="KV cache blocks"):
            await load(engine, "prefix")
        await check_gone(engine)


async def test_drain_answers_who_loads_and_unloads(root: Path) -> None:
    async with running(adapters_root=str(root)) as engine:
        gate = LoaderGate(engine)
        await load(engine, "v2", "b")
        loading = asyncio.create_task(load(engine, "v1", "a"))
        behind = asyncio.create_task(engine.unload_adapter("a"))
        await load(engine, "v1", "c", wait=False)
        await until(lambda: gate.waiting > 0)
        async with asyncio.timeout(5):
            await engine.drain(0.1)
            results = await asyncio.gather(loading, behind, return_exceptions=True)
        gate.release()
        assert [type(r) for r in results] == [Draining, Draining]


DOCUMENTED = (AdapterExists, AdapterLoading, AdapterNotFound, Draining)


async def test_a_storm_on_the_same_names(world: World) -> None:
    """Whatever comes out of it is one of the documented errors, or exactly one revision's answer."""
    engine = world.engine
    expected = {world.revisions[source]: world.answers[source] for source in SOURCES}
    served = 0

    async def client(seed: int) -> None:
        nonlocal served
        choose = random.Random(seed)
        for _ in range(25):
            name = choose.choice(["a", "b"])
            try:
                if choose.random() < 0.5:
                    answer = await ask(engine, request(PROMPT, name, choose.choice([1, 5, 24])))
                    assert answer.ids == expected[answer.revision][: len(answer.ids)]
                    served += 1
                elif choose.random() < 0.7:
                    await load(
                        engine,
                        choose.choice(list(SOURCES)),
                        name,
                        replace=choose.random() < 0.6,
                        wait=choose.random() < 0.6,
                    )
                else:
                    await engine.unload_adapter(name, wait=choose.random() < 0.6)
            except DOCUMENTED:
                await asyncio.sleep(0.001)

    async with asyncio.timeout(60):
        await asyncio.gather(*(client(seed) for seed in range(16)))
    assert served > 20
    await until(lambda: all(info.state is not AdapterState.LOADING for info in engine.list_adapters()))


@pytest.mark.parametrize("source", ["v1", "prefix"])
@pytest.mark.parametrize("call", [1, 2, 5])
async def test_a_placement_that_fails_leaves_nothing_behind(
    world: World, monkeypatch: pytest.MonkeyPatch, source: str, call: int
) -> None:
    """As an allocation on the device would, at some site or at some layer of a prefix."""
    engine = world.engine
    lowrank = {ref.group.lowrank for ref in engine._core._runner.model.sites.values()}
    owner, name = (type(next(iter(lowrank))._path), "put") if source == "v1" else (cache, "_like")
    inner: Any = getattr(owner, name)
    calls: list[int] = []

    def fails(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("out of memory")
        return inner(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            await load(engine, source)
    await check_gone(engine)
    assert all(site.empty for site in lowrank)
    await load(engine, source)
    assert (await ask(engine, request(PROMPT, source, 24))).ids == world.answers[source]
