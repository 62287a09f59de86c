"""The engine on a CUDA device: the numbers of PEFT, captured steps, steps launched ahead, loads beside them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from benchmarks.engine_adapters import KINDS
from benchmarks.engine_model import TINY, random_llama
from benchmarks.engine_session import Session
from peftmux.adapters.parts import LinearPart
from peftmux.runtime.engine import factory
from peftmux.runtime.engine.local import LocalEngine
from peftmux.runtime.model import graphs
from peftmux.runtime.model.graphs import CudaCapture, DecodeGraphs
from peftmux.runtime.model.load import fit_model
from peftmux.runtime.model.staging import Readback, to_device
from peftmux.runtime.model.upload import Upload
from peftmux.runtime.params import SamplingParams
from tests.engine.harness import Answer, ask, ask_all, check_quiet, load, request, running
from tests.parity.fixtures import cases, folders

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

T = TypeVar("T")
PROMPT = [1, 44, 48, 90, 66, 9, 10, 41]
IN_GRAPHS = ["lora", "lora_dora", "ia3", "prefix", "lora_rank_alpha_pattern", "ln_tuning", "shira"]
_BUSY_CYCLES = 3_000_000_000
"""Well over a second on any device."""


def serve(work: Callable[[LocalEngine], Awaitable[T]], **settings: Any) -> T:
    """What `work` gives over an engine on the device, in float32."""

    async def run() -> T:
        async with running(device="cuda", **settings) as engine:
            return await work(engine)

    return asyncio.run(run())


def graphs_of(engine: LocalEngine) -> DecodeGraphs:
    found = engine._core._runner.graphs
    assert found is not None, "expected decode graphs on a CUDA device with triton"
    return found


@pytest.mark.parametrize("base", ["llama", "qwen2"])
def test_every_folder_gives_peft_s_tokens(base: str) -> None:
    """All adapters in one batch, with rows of the base."""

    async def work(engine: LocalEngine) -> list[Answer]:
        for folder in folders(base):
            await load(engine, folder)
        wanted = [request(c.ids, c.folder, len(c.greedy), task=c.task) for c in cases(base)]
        return await ask_all(engine, [*wanted, request(PROMPT), request(PROMPT[:3])])

    answers = serve(work, name=base)
    wrong = [str(c) for c, a in zip(cases(base), answers, strict=False) if a.ids != c.greedy]
    assert wrong == []


async def mixed(engine: LocalEngine) -> list[Answer]:
    """Every bucket up to 16, kinds that graphs serve, and drawn tokens."""
    for name in IN_GRAPHS:
        await load(engine, name)
    answers = []
    for count in (1, 2, 3, 8, 13):
        wanted = [
            request(
                [*PROMPT[: 3 + i % 5], 20 + i],
                ("", *IN_GRAPHS)[i % (1 + len(IN_GRAPHS))],
                6 + i % 3,
                sampling=SamplingParams(temperature=0.8, top_k=20, seed=i) if i % 2 else None,
                logprobs=1,
            )
            for i in range(count)
        ]
        answers += await ask_all(engine, wanted)
    return answers


async def mixed_and_counted(engine: LocalEngine) -> tuple[list[Answer], int, bool]:
    answers = await mixed(engine)
    found = graphs_of(engine)
    await check_quiet(engine, engine.stats().kv_cache_usage)
    return answers, found.replays, found.in_use


def test_graphs_give_what_steps_without_them_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "decode_graphs", lambda *_: None)
    eager = serve(mixed)
    monkeypatch.undo()
    replayed, replays, in_use = serve(mixed_and_counted)
    assert in_use, "a capture has failed: see the log"
    assert replays > 20
    for one, other in zip(replayed, eager, strict=True):
        assert one.ids == other.ids
        assert one.values == pytest.approx(other.values, abs=1e-4)


def test_a_replay_gives_the_bits_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step is replayed, then run as it comes over the same inputs."""
    unequal: list[int] = []

    class Twice(CudaCapture):
        def __call__(self, forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
            replay = super().__call__(forward)

            def both() -> Tensor:
                logits = replay().clone()
                if not torch.equal(logits, forward()):
                    unequal.append(len(logits))
                return logits

            return both

    monkeypatch.setattr(graphs, "CudaCapture", Twice)
    _, replays, in_use = serve(mixed_and_counted)
    assert in_use, "a capture has failed: see the log"
    assert replays > 20
    assert unequal == []


def test_adapters_come_and_go_without_a_capture() -> None:
    async def work(engine: LocalEngine) -> tuple[int, int]:
        found = graphs_of(engine)
        await load(engine, "lora")
        expected = (await ask(engine, request(PROMPT, "lora", 8))).ids
        captures = found.captures
        for _ in range(3):
            await load(engine, "lora", "other")
            assert (await ask(engine, request(PROMPT, "other", 8))).ids == expected
            await engine.unload_adapter("other")
        return captures, found.captures

    before, after = serve(work, max_rows=4)
    assert before == after


def test_loads_leave_a_running_stream_as_it_is() -> None:
    async def work(engine: LocalEngine) -> tuple[list[int], list[int]]:
        await load(engine, "lora")
        long = request(PROMPT, "lora", 100)
        alone = await ask(engine, long)

        async def storm() -> None:
            for i in range(8):
                await load(engine, IN_GRAPHS[i % len(IN_GRAPHS)], f"passing-{i}")
                await ask(engine, request(PROMPT, f"passing-{i}", 2))
                await engine.unload_adapter(f"passing-{i}")

        beside, _ = await asyncio.gather(ask(engine, long), storm())
        return alone.ids, beside.ids

    alone, beside = serve(work)
    assert alone == beside


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_replays_every_kind(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    model = fit_model(random_llama(TINY, device, dtype), None, "random", TINY.context)
    session = Session(model, TINY, 8, 5)
    session.warm_up()
    assert session.decode([None, *session.adapters(tuple(KINDS), 7)]).replayed


def test_a_step_is_launched_without_waiting_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy decode under adapters: with the device busy for a second, the launch returns at once."""
    device = torch.device("cuda")
    model = fit_model(random_llama(TINY, device, torch.bfloat16), None, "random", TINY.context)
    session = Session(model, TINY, 8, 5)
    session.warm_up()
    session.decode(session.adapters(tuple(KINDS), 6))  # compiled and captured
    runner = session._core._runner
    launch, seconds = runner.launch, []

    def timed(*step: Any) -> Any:
        torch.cuda.synchronize()
        torch.cuda._sleep(_BUSY_CYCLES)
        started = time.perf_counter()
        launched = launch(*step)
        seconds.append(time.perf_counter() - started)
        return launched

    monkeypatch.setattr(runner, "launch", timed)
    session.decode(session.adapters(tuple(KINDS), 6))
    assert sorted(seconds)[len(seconds) // 2] < 0.2, seconds


def test_values_come_back_before_what_was_launched_later() -> None:
    values = torch.arange(6, device="cuda").view(2, 3)
    torch.cuda.synchronize()
    back = Readback(values)
    torch.cuda._sleep(_BUSY_CYCLES)
    started = time.perf_counter()
    assert back.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert time.perf_counter() - started < 0.5
    torch.cuda.synchronize()


def test_numbers_of_two_steps_do_not_meet() -> None:
    """The host writes the second step's before the first step's copy has begun."""
    torch.cuda.synchronize()
    torch.cuda._sleep(_BUSY_CYCLES)
    steps = [to_device([[i] * 100, [], [i + 1] * 7], torch.device("cuda")) for i in range(8)]
    for i, (first, empty, last) in enumerate(steps):
        assert first.tolist() == [i] * 100
        assert (empty.numel(), last.tolist()) == (0, [i + 1] * 7)


def test_an_upload_does_not_wait_for_steps() -> None:
    part = LinearPart(torch.randn(64, 4096), torch.randn(4096, 64))
    device = torch.device("cuda")
    with Upload(device) as warm:
        warm.move(part)
    torch.cuda.synchronize()
    torch.cuda._sleep(_BUSY_CYCLES)
    started = time.perf_counter()
    with Upload(device) as upload:
        moved = upload.move(part)
        torch.cuda.current_stream().synchronize()
    assert time.perf_counter() - started < 0.5
    upload.wait([] if moved.a is None or moved.b is None else [moved.a, moved.b])
    assert moved.a is not None
    assert part.a is not None
    assert torch.equal((moved.a + 0).cpu(), part.a)


def test_memory_of_an_upload_is_not_taken_while_a_step_that_reads_it_is_queued() -> None:
    """The next upload would write over it: the step's copy below is made after a busy second."""
    device = torch.device("cuda")
    first, second = (LinearPart(torch.randn(64, 4096), torch.randn(4096, 64)) for _ in range(2))
    for part in (first, second):  # pinned memory is taken before the time that counts
        with Upload(device) as warm:
            warm.move(part)
    torch.cuda.synchronize()
    with Upload(device) as upload:
        moved = upload.move(first)
    assert moved.a is not None
    assert moved.b is not None
    assert first.a is not None
    read = torch.empty_like(moved.a)
    upload.wait([moved.a, moved.b])
    torch.cuda._sleep(_BUSY_CYCLES)
    read.copy_(moved.a)
    del moved
    with Upload(device) as upload:
        other = upload.move(second)
    torch.cuda.synchronize()
    assert torch.equal(read.cpu(), first.a)
    assert other.a is not None
    assert second.a is not None
    assert torch.equal(other.a.cpu(), second.a)
