"""Rows that generate nothing, in a whole engine: what they read, what they are refused, and how they end early."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from peftmux.adapters.errors import AdapterInvalid
from peftmux.runtime.engine.api import ClassificationRequest, EmbeddingRequest, Pooling
from peftmux.runtime.engine.local import LocalEngine
from peftmux.runtime.errors import DeadlineExceeded, Draining, InvalidRequest, NotFinite, StepFailed, TaskMismatch
from peftmux.runtime.scheduler.row import Row
from tests.engine.harness import (
    StepGate,
    adapters,
    ask,
    base,
    check_quiet,
    in_engine_thread,
    load,
    opened,
    request,
    running,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = (1, 44, 48, 90, 66, 9, 10, 41, 92, 60)
CONTEXT = 128


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEFT's adapters, a head alone, and a head too large for its logits."""
    root = tmp_path_factory.mktemp("adapters")
    for name in ("lora", "lora.seq_cls", "lora.token_cls", "prefix.seq_cls"):
        shutil.copytree(Path(adapters(), name), root / name)
    for name, scale, task in (("head", 1.0, "SEQ_CLS"), ("tags", 1.0, "TOKEN_CLS"), ("huge", 3e38, "SEQ_CLS")):
        (root / name).mkdir()
        (root / name / "adapter_config.json").write_text(json.dumps({"peft_type": "HEAD", "task_type": task}))
        weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(2)).clamp(-1, 1) * scale
        tensors = {"base_model.model.score.weight": weight}
        if task == "TOKEN_CLS":
            tensors["base_model.model.score.bias"] = torch.zeros(4)
        save_file(tensors, root / name / "adapter_model.safetensors")
    return root


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(root: Path) -> AsyncIterator[LocalEngine]:
    async with running(adapters_root=str(root), block_size=4, max_batch_tokens=16) as engine:
        for name in sorted(path.name for path in root.iterdir()):
            await load(engine, name)
        usage = engine.stats().kv_cache_usage
        yield engine
        await check_quiet(engine, usage)


@pytest.fixture(scope="module")
def states() -> Any:
    """ids -> the base's final hidden states [T, D]."""
    module = AutoModelForCausalLM.from_pretrained(base(), dtype=torch.float32, attn_implementation="eager").eval()

    @torch.inference_mode()
    def compute(ids: tuple[int, ...]) -> torch.Tensor:
        found: torch.Tensor = module.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        return found

    return compute


async def test_embeddings_are_the_states(engine: LocalEngine, states: Any) -> None:
    prompt = PROMPT * 3  # two chunks
    expected = states(prompt)
    for pooling, value in ((Pooling.MEAN, expected.mean(0)), (Pooling.LAST, expected[-1])):
        for normalize in (False, True):
            got = await engine.embed(EmbeddingRequest(prompt, pooling=pooling, normalize=normalize))
            wanted = value / value.norm() if normalize else value
            torch.testing.assert_close(torch.tensor(got.values), wanted, rtol=0, atol=1e-4)
            assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.adapter_revision) == (30, 0, "")


async def test_an_adapters_parts_apply_and_its_head_does_not(engine: LocalEngine, states: Any) -> None:
    base_states = states(PROMPT)[-1]
    values = {}
    for name in ("lora", "lora.seq_cls", "head"):
        got = await engine.embed(EmbeddingRequest(PROMPT, name, Pooling.LAST))
        values[name] = torch.tensor(got.values)
        assert got.adapter_revision == engine.get_adapter(name).revision
    torch.testing.assert_close(values["head"], base_states, rtol=0, atol=1e-4)
    assert (values["lora"] - base_states).abs().max() > 0.1
    assert (values["lora.seq_cls"] - base_states).abs().max() > 0.1


async def test_a_head_alone_reads_the_base_and_shares_its_cache(engine: LocalEngine, states: Any, root: Path) -> None:
    prompt = (7, *PROMPT)
    weight = load_file(root / "head" / "adapter_model.safetensors")["base_model.model.score.weight"]
    logits = states(prompt) @ weight.T
    await ask(engine, request(prompt))
    one = await engine.classify(ClassificationRequest(prompt, "head"))
    torch.testing.assert_close(torch.tensor(one.logits), logits[-1:], rtol=0, atol=1e-4)
    assert one.usage.cached_tokens == 8
    each = await engine.classify(ClassificationRequest(prompt, "tags"))
    torch.testing.assert_close(torch.tensor(each.logits), logits, rtol=0, atol=1e-4)
    assert each.usage.cached_tokens == 0
    assert len(each.labels) == len(prompt)


async def test_padding_at_the_end_is_not_read_nor_computed(engine: LocalEngine) -> None:
    plain = await engine.classify(ClassificationRequest(PROMPT, "lora.seq_cls"))
    padded = await engine.classify(ClassificationRequest((*PROMPT, 0, 0, 0), "lora.seq_cls"))
    assert padded.logits[0] == pytest.approx(plain.logits[0], abs=1e-5)
    assert padded.usage.prompt_tokens == 13
    nothing_else = await engine.classify(ClassificationRequest((0, 0), "lora.seq_cls"))
    first = await engine.classify(ClassificationRequest((0,), "lora.seq_cls"))
    assert nothing_else.logits[0] == pytest.approx(first.logits[0], abs=1e-5)
    tagged = await engine.classify(ClassificationRequest((*PROMPT, 0, 0), "lora.token_cls"))
    assert len(tagged.logits) == 12


@pytest.mark.parametrize("name", ["", "lora"])
async def test_what_has_no_head_does_not_classify(engine: LocalEngine, name: str) -> None:
    with pytest.raises(TaskMismatch, match="expected an adapter with a classification head"):
        await engine.classify(ClassificationRequest(PROMPT, name))


@pytest.mark.parametrize("name", ["lora.seq_cls", "prefix.seq_cls", "tags"])
async def test_what_classifies_does_not_generate(engine: LocalEngine, name: str) -> None:
    with pytest.raises(TaskMismatch, match="expected an adapter that generates"):
        await ask(engine, request(PROMPT, name))


@pytest.mark.parametrize("name", ["", "lora"])
async def test_an_adapter_without_tasks_takes_none(engine: LocalEngine, name: str) -> None:
    with pytest.raises(InvalidRequest, match="has no tasks, got 0") as refusal:
        await engine.embed(EmbeddingRequest(PROMPT, name, task=0))
    assert refusal.value.field == "adapter_task"


@pytest.mark.parametrize(("name", "room"), [("", CONTEXT), ("lora.seq_cls", CONTEXT), ("prefix.seq_cls", CONTEXT - 5)])
async def test_a_prompt_may_fill_the_context(engine: LocalEngine, name: str, room: int) -> None:
    await engine.embed(EmbeddingRequest((5,) * room, name))
    with pytest.raises(InvalidRequest, match=f"expected at most {room} tokens") as refusal:
        await engine.embed(EmbeddingRequest((5,) * (room + 1), name))
    assert refusal.value.field == "input"


@pytest.mark.parametrize("prompt", [(), (96,), (-1,)])
async def test_a_bad_prompt_is_refused(engine: LocalEngine, prompt: tuple[int, ...]) -> None:
    for refused in (
        engine.embed(EmbeddingRequest(prompt)),
        engine.classify(ClassificationRequest(prompt, "lora.seq_cls")),
    ):
        with pytest.raises(InvalidRequest) as refusal:
            await refused
        assert refusal.value.field == "input"


async def test_logits_that_are_not_finite_end_their_row_alone(engine: LocalEngine) -> None:
    alone = await engine.classify(ClassificationRequest(PROMPT, "head"))
    huge, beside = await asyncio.gather(
        engine.classify(ClassificationRequest(PROMPT, "huge")),
        engine.classify(ClassificationRequest(PROMPT, "head")),
        return_exceptions=True,
    )
    assert isinstance(huge, NotFinite)
    assert not isinstance(beside, BaseException)
    assert beside.logits[0] == pytest.approx(alone.logits[0], abs=1e-5)
    assert (await engine.embed(EmbeddingRequest(PROMPT, "huge"))).values  # its states are


async def test_the_output_projection_sees_rows_that_sample_only(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    head = engine._core._runner.model.module.get_output_embeddings()
    assert head is not None
    forward = head.forward

    def seeing(x: Tensor) -> Tensor:
        seen.append(x.shape[1])
        out: Tensor = forward(x)
        return out

    monkeypatch.setattr(head, "forward", seeing)
    await engine.classify(ClassificationRequest(PROMPT, "tags"))
    assert set(seen) == {0}
    await asyncio.gather(ask(engine, request(PROMPT, "", 3)), engine.embed(EmbeddingRequest(PROMPT, "lora")))
    assert max(seen) == 1


async def test_a_deadline_ends_it(engine: LocalEngine) -> None:
    with pytest.raises(DeadlineExceeded):
        await engine.embed(EmbeddingRequest(PROMPT, deadline=time.monotonic() - 1))
    gate = StepGate(engine)
    gate.hold()
    try:
        late = asyncio.create_task(engine.embed(EmbeddingRequest(PROMPT * 4, deadline=time.monotonic() + 0.05)))
        await gate.step_begins()
        await asyncio.sleep(0.1)
        gate.release()
        with pytest.raises(DeadlineExceeded):
            await late
    finally:
        gate.remove()


async def test_cancelling_it_frees_the_row(engine: LocalEngine) -> None:
    before = engine.stats().kv_cache_usage
    gate = StepGate(engine)
    gate.hold()
    try:
        task = asyncio.create_task(engine.classify(ClassificationRequest(PROMPT * 4, "tags")))
        await gate.step_begins()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    finally:
        gate.remove()
    await in_engine_thread(engine, lambda: None)
    await check_quiet(engine, before)


async def test_a_step_that_fails_is_answered(engine: LocalEngine) -> None:
    gate = StepGate(engine)
    gate.failures.append(RuntimeError("made to fail"))
    try:
        with pytest.raises(StepFailed):
            await engine.classify(ClassificationRequest(PROMPT, "tags"))
    finally:
        gate.remove()
    assert await engine.classify(ClassificationRequest(PROMPT, "tags"))


async def test_preempted_readouts_give_the_same(root: Path, monkeypatch: Any) -> None:
    """A cache of few blocks: rows that generate push long prompts out, also in the middle of their chunks."""
    memory = 24 * 4 * 3 * 2 * 16 * 4
    prompts = [tuple((7 * i + 3 * j) % 90 + 1 for i in range(40)) for j in range(4)]
    async with running(adapters_root=str(root), block_size=4, kv_cache_memory=memory, max_batch_tokens=6) as small:
        for name in ("lora", "tags", "lora.token_cls"):
            await load(small, name)
        usage = small.stats().kv_cache_usage
        asked = [ClassificationRequest(p, n) for p in prompts for n in ("tags", "lora.token_cls")]
        alone = [await small.classify(one) for one in asked]
        means = [await small.embed(EmbeddingRequest(p, "lora")) for p in prompts]
        scheduler = small._core.scheduler
        preempted: list[Row] = []
        preempt = scheduler._preempt

        def noted(row: Row) -> None:
            preempted.append(row)
            preempt(row)

        monkeypatch.setattr(scheduler, "_preempt", noted)
        generating = [asyncio.create_task(ask(small, request(p[:6], "lora", 30, priority=1))) for p in prompts[:3]]
        together = await asyncio.gather(*(small.classify(one) for one in asked))
        pooled = await asyncio.gather(*(small.embed(EmbeddingRequest(p, "lora")) for p in prompts))
        await asyncio.gather(*generating)
        assert any(row.new.readout is not None and row.next_reported > 0 for row in preempted)
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(torch.tensor(a.logits), torch.tensor(b.logits), rtol=0, atol=1e-4)
        for m, n in zip(means, pooled, strict=True):
            assert m.values == pytest.approx(n.values, abs=1e-4)
        await check_quiet(small, usage)


async def test_draining_refuses_and_ends_readouts(root: Path) -> None:
    async with running(adapters_root=str(root)) as leaving:
        gate = StepGate(leaving)
        gate.hold()
        task = asyncio.create_task(leaving.embed(EmbeddingRequest(PROMPT)))
        await gate.step_begins()
        draining = asyncio.create_task(leaving.drain(0.0))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await leaving.embed(EmbeddingRequest(PROMPT))
        gate.release()
        await asyncio.gather(task, return_exceptions=True)
        await draining


async def test_a_replaced_adapter_keeps_its_labels_for_those_in_flight(root: Path, tmp_path: Path) -> None:
    async with running(adapters_root=str(root)) as engine:
        await load(engine, "tags", "a")
        gate = StepGate(engine)
        gate.hold()
        task = asyncio.create_task(engine.classify(ClassificationRequest(PROMPT, "a")))
        await gate.step_begins()
        replacing = asyncio.create_task(load(engine, "lora.token_cls", "a", replace=True))
        await asyncio.sleep(0.05)
        gate.remove()
        await replacing
        assert (await task).names == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")
        assert len((await engine.classify(ClassificationRequest(PROMPT, "a"))).names) == 3


async def test_a_base_that_hides_its_states_takes_no_head(engine: LocalEngine, monkeypatch: Any) -> None:
    monkeypatch.setattr(engine._core._runner.model._tap, "width", 0)
    with pytest.raises(AdapterInvalid, match="final hidden states"):
        await load(engine, "head", "hidden")


async def test_streams_beside_readouts_stay_streams(engine: LocalEngine) -> None:
    async with opened(engine, request(PROMPT, "lora", 4)) as stream:
        reading = asyncio.gather(*(engine.embed(EmbeddingRequest(PROMPT, "lora")) for _ in range(4)))
        deltas = [delta async for delta in stream]
    await reading
    assert sum(len(delta.token_ids) for delta in deltas) == 4
    assert all(delta.states == () for delta in deltas)
