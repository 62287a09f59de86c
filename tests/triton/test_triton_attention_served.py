"""Whole models whose attention is Triton's, in the interpreter: windows, caps, sinks, prefixes and images, served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peftmux.kernels.attention import AttentionPath, triton_ops
from peftmux.kernels.attention.tiles import KINDS
from peftmux.kernels.attention.triton_path import TritonAttention
from peftmux.runtime.model import cache
from peftmux.runtime.model.load import fit_model
from tests.engine.harness import FIXTURES, ask_all, check_quiet, load, request, running
from tests.model.families import build, greedy
from tests.model.mixtures import write
from tests.model.test_families import engine_over
from tests.model.test_vora_served import PaperModel, base_of, cases, fields, tensors_for, with_images
from tests.model.test_vora_served import engine_over as image_engine
from tests.parity.test_parity_served import TOLERANCE, VOCABULARY, table

PROMPTS = [[5, 9, 17, 33, 3, 7, 8, 60, 61], [101, 44, 3]]
NEW_TOKENS = 2
CASES = cases()[1:4]
"""Prompts with an image in front, with two that touch, with one larger than the adapter knows."""


@pytest.fixture(autouse=True)
def kinds(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Give every cache Triton's attention; -> the kinds of items that were launched."""
    launched: set[int] = set()
    kernel = triton_ops.attend_tiles  # type: ignore[attr-defined]

    class Noted:
        def __getitem__(self, grid: tuple[int, int]) -> Any:
            def launch(*args: Any, **constants: Any) -> None:
                launched.add(constants["KIND"])
                kernel[grid](*args, **constants)

            return launch

    def chosen(device: Any, dtype: Any) -> AttentionPath:
        own = TritonAttention(device, dtype)
        return AttentionPath("triton", own.attend, own.write_kv)

    monkeypatch.setattr(triton_ops, "attend_tiles", Noted())
    monkeypatch.setattr(cache, "choose_attention", chosen)
    yield launched
    assert launched, "nothing went through Triton's attention"


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
async def test_family_is_served_exactly(family: str, kinds: set[int]) -> None:
    """A window with a soft cap, and with sinks."""
    module = build(family)
    expected = [greedy(module, prompt, NEW_TOKENS) for prompt in PROMPTS]
    engine = engine_over(fit_model(module, None, family))
    try:
        answers = await ask_all(engine, [request(prompt, max_tokens=NEW_TOKENS) for prompt in PROMPTS])
        assert [answer.ids for answer in answers] == expected
        await check_quiet(engine)
    finally:
        await engine.drain(0.0)
    assert kinds == {KINDS[0], KINDS[2]}


async def test_prefixes_are_blocks_in_front() -> None:
    """The numbers that PEFT saved, beside a row of the base and one of a LoRA."""
    folders = ["prefix", "prefix_projection", "lora"]
    async with running(adapters_root=str(FIXTURES), block_size=4) as engine:
        wanted, expected = [], []
        for folder in folders:
            await load(engine, f"peft/llama/{folder}", folder)
            saved = load_file(FIXTURES / "peft" / "llama" / folder / "expected.safetensors")
            ids = saved["input_ids"][0].tolist()
            expected.append(saved["logits"][0][-len(ids) :].float().log_softmax(-1))
            wanted.append(request(ids, folder, 1, prompt_logprobs=VOCABULARY))
        for answer, logprobs in zip(await ask_all(engine, wanted), expected, strict=True):
            torch.testing.assert_close(table(answer), logprobs[:-1], rtol=0, atol=TOLERANCE)
        for folder in folders:
            await engine.unload_adapter(folder)
        await check_quiet(engine)


async def test_images_are_seen_both_ways(tmp_path: Path) -> None:
    module = base_of("llama")
    tensors = tensors_for("llama", module)
    write(tmp_path / "vora", fields("llama"), tensors)
    model = PaperModel("llama", module, tensors)
    engine = image_engine("llama", tmp_path)
    try:
        await load(engine, "vora")
        answers = await ask_all(engine, [with_images(prompt, images) for prompt, images in CASES])
    finally:
        await engine.drain(0.0)
    for (prompt, images), answer in zip(CASES, answers, strict=True):
        ids, values = model.greedy(prompt, images, len(answer.ids))
        assert answer.ids == ids
        assert answer.values == pytest.approx(values, abs=3e-4)
