"""Virtual tokens on many bases: PEFT's own numbers, whatever scales embeddings, slides windows or shares a batch."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn

from peftmux.runtime.errors import AdapterMemoryExhausted, InvalidRequest
from tests.engine.harness import ask, ask_all, check_quiet, load, request
from tests.model.families import build
from tests.model.test_family_adapters import engine_for, lora, save_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS = [[5, 9, 17, 33, 3, 7, 8, 60, 61, 62, 63, 64], [101, 44, 3]]
NEW_TOKENS = 6
TASK: Any = {"task_type": "CAUSAL_LM"}


def prompt(count: int) -> PeftConfig:
    return PromptTuningConfig(num_virtual_tokens=count, **TASK)


def p_tuning(count: int, encoder: str) -> PeftConfig:
    return PromptEncoderConfig(
        num_virtual_tokens=count, encoder_hidden_size=24, encoder_reparameterization_type=encoder, **TASK
    )


CASES: dict[str, tuple[str, PeftConfig]] = {
    "llama": ("llama", prompt(7)),
    "gpt2-positions-learned": ("gpt2", p_tuning(5, "MLP")),
    "phi": ("phi", p_tuning(3, "LSTM")),
    "gemma-scaled-embeddings": ("gemma", prompt(4)),
    "gemma2-scaled-softcap": ("gemma2", prompt(11)),
    "gemma3-scaled-windows": ("gemma3_text", p_tuning(13, "MLP")),
    "mistral-longer-than-the-window": ("mistral", prompt(19)),
    "gpt_oss-sinks": ("gpt_oss", prompt(6)),
    "deepseek-other-value-width": ("deepseek_v3", prompt(5)),
    "granite-multiplied-embeddings": ("granite", prompt(5)),
}


def save(family: str, config: PeftConfig, folder: Path, std: float = 0.5) -> Any:
    """A random adapter in PEFT's files; returns the model that PEFT runs from them."""
    torch.manual_seed(1)
    adapted: Any = get_peft_model(build(family), config)
    for name, parameter in adapted.prompt_encoder.named_parameters():
        nn.init.normal_(parameter, std=std if "embedding" in name or "prefix_task" in name else 0.3)
    adapted.save_pretrained(str(folder))
    return PeftModel.from_pretrained(build(family), str(folder)).eval()


@torch.inference_mode()
def greedy(module: Any, ids: list[int], count: int = NEW_TOKENS, **inputs: Any) -> list[int]:
    """One whole unpadded forward a token, so that nothing depends on anybody's cache."""
    row = list(ids)
    for _ in range(count):
        row.append(int(module(input_ids=torch.tensor([row]), **inputs).logits[0, -1].argmax()))
    return row[len(ids) :]


@pytest.mark.parametrize("case", CASES)
async def test_rows_are_exact_beside_base_rows(case: str, tmp_path: Path) -> None:
    """Steps of 8 tokens and blocks of 4: longer prompts are computed in several chunks, tails are copied."""
    family, config = CASES[case]
    adapted, base = save(family, config, tmp_path / "a"), build(family)
    expected = [greedy(adapted, ids) for ids in PROMPTS] + [greedy(base, ids) for ids in PROMPTS]
    assert expected[0] != expected[2], "the adapter is invisible"
    async with engine_for(family, tmp_path) as engine:
        info = await load(engine, "a")
        wanted = [request(ids, name, NEW_TOKENS) for name in ("a", "") for ids in PROMPTS]
        for _ in range(2):  # the second time from the prefix cache
            assert [answer.ids for answer in await ask_all(engine, wanted)] == expected
        assert info.kind == ("prompt" if isinstance(config, PromptTuningConfig) else "p-tuning")
        assert info.bytes > 0
        await engine.unload_adapter("a")
        await check_quiet(engine)


async def test_each_task_has_its_own_tokens(tmp_path: Path) -> None:
    config = MultitaskPromptTuningConfig(num_virtual_tokens=5, num_tasks=3, num_ranks=2, **TASK)
    adapted = save("llama", config, tmp_path / "a", std=1.0)
    jobs = [(task, ids) for task in range(3) for ids in PROMPTS]
    expected = [greedy(adapted, ids, task_ids=torch.tensor([task])) for task, ids in jobs]
    assert len({tuple(tokens) for tokens in expected[::2]}) == 3, "the tasks are one"
    async with engine_for("llama", tmp_path) as engine:
        info = await load(engine, "a")
        first = await ask_all(engine, [request(ids, "a", NEW_TOKENS, task=task) for task, ids in jobs])
        again = [await ask(engine, request(ids, "a", NEW_TOKENS, task=task)) for task, ids in jobs]
        assert [answer.ids for answer in first] == [answer.ids for answer in again] == expected
        assert all(answer.cached == 0 for answer in first), "tasks share what they must not"
        for task, message in ((None, "0 to 2"), (3, "0 to 2")):
            with pytest.raises(InvalidRequest, match=message) as refusal:
                await ask(engine, request(PROMPTS[0], "a", task=task))
            assert refusal.value.field == "adapter_task"
        await engine.unload_adapter("a")
        await check_quiet(engine)
    one = await _bytes("llama", prompt(5), tmp_path / "one")
    assert info.bytes == 3 * one


async def _bytes(family: str, config: PeftConfig, root: Path) -> int:
    save(family, config, root / "a")
    async with engine_for(family, root) as engine:
        return (await load(engine, "a")).bytes


async def test_a_task_of_an_adapter_without_tasks_is_refused(tmp_path: Path) -> None:
    save("llama", prompt(5), tmp_path / "a")
    async with engine_for("llama", tmp_path) as engine:
        await load(engine, "a")
        for name in ("a", ""):
            with pytest.raises(InvalidRequest, match="no tasks") as refusal:
                await ask(engine, request(PROMPTS[0], name, task=0))
            assert refusal.value.field == "adapter_task"


async def test_running_rows_have_a_step_between_two_chunks_of_a_load(tmp_path: Path) -> None:
    """Steps hold 8 tokens: 40 virtual tokens are five of them, and a stream goes on between."""
    save("llama", prompt(40), tmp_path / "a")
    async with engine_for("llama", tmp_path) as engine:
        alone = await ask(engine, request(PROMPTS[0], "", 200))
        placement, runner = engine._adapters._placement, engine._core._runner
        compute, run, ask_thread = placement.compute, runner.run, engine._thread.ask
        ready = threading.Event()
        before: list[int] = []
        """Steps before each chunk."""
        steps = 0

        def step(plan: Any) -> Any:
            nonlocal steps
            steps += 1
            assert steps < 4 or ready.wait(20)
            return run(plan)

        def noted(chunk: Any) -> None:
            before.append(steps)
            assert len(chunk.embeddings) <= 8
            compute(chunk)

        def loaded(call: Any) -> Any:
            """Of the load: the files are read, what follows runs beside the stream."""
            ready.set()
            return ask_thread(call)

        placement.compute, runner.run = noted, step  # type: ignore[method-assign]
        engine._thread.ask = loaded  # type: ignore[method-assign]
        stream = asyncio.create_task(ask(engine, request(PROMPTS[0], "", 200)))
        await load(engine, "a")
        assert (await stream).ids == alone.ids
        assert len(before) == len(set(before)) == 5, "two chunks ran without a step between them"


async def test_a_load_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    """Every task's blocks or none."""
    config = MultitaskPromptTuningConfig(num_virtual_tokens=60, num_tasks=12, num_ranks=1, **TASK)
    save("llama", config, tmp_path / "a")
    async with engine_for("llama", tmp_path, kv_cache_memory=60_000) as engine:
        with pytest.raises(AdapterMemoryExhausted, match="blocks"):
            await load(engine, "a")
        assert engine.list_adapters() == ()
        await check_quiet(engine)


async def test_a_failure_while_computing_leaves_nothing_behind(tmp_path: Path) -> None:
    save("llama", prompt(20), tmp_path / "a")
    async with engine_for("llama", tmp_path) as engine:
        placement = engine._adapters._placement

        def fail(chunk: Any) -> None:
            raise RuntimeError("no")

        placement.compute = fail  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="no"):
            await load(engine, "a")
        del placement.compute
        assert engine.list_adapters() == ()
        await check_quiet(engine)
        assert placement.bytes == 0
        await load(engine, "a")


async def test_virtual_tokens_mixed_with_other_kinds(tmp_path: Path) -> None:
    adapted = {
        "prompt": save("qwen3", prompt(6), tmp_path / "prompt"),
        "p": save("qwen3", p_tuning(3, "MLP"), tmp_path / "p"),
        "lora": save_adapter("qwen3", lora(target_modules="all-linear"), tmp_path / "lora"),
    }
    modules = {**adapted, "": build("qwen3")}
    jobs = [(name, ids) for ids in PROMPTS for name in modules]
    expected = [greedy(modules[name], ids) for name, ids in jobs]
    async with engine_for("qwen3", tmp_path) as engine:
        for name in adapted:
            await load(engine, name)
        answers = await ask_all(engine, [request(ids, name, NEW_TOKENS) for name, ids in jobs])
        assert [answer.ids for answer in answers] == expected
        assert [answer.usage.prompt_tokens for answer in answers if answer.usage] == [len(ids) for _, ids in jobs]
