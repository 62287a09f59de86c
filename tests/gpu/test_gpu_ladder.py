"""A ladder's rows beside base rows on a CUDA device, against the paper's formula on the CPU."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from peftmux.runtime.engine.factory import EngineConfig, build_engine
from peftmux.runtime.engine.observer import NullObserver
from peftmux.runtime.model.load import fit_model
from tests.engine.harness import Answer, ask_all, load, request
from tests.model.families import VOCABULARY, build, greedy
from tests.model.ladders import PaperLadder, ladder_fields, ladder_tensors
from tests.model.mixtures import logprobs, table, write

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
PROMPTS = [[5, 9, 17, 33, 3, 7, 8, 60, 61, 62, 63, 64], [101, 44, 3]]


async def answers(root: Path) -> list[Answer]:
    """Of the ladder and of the base, by prompt; twice, so that the second time the prefix cache is used."""
    config = EngineConfig(model="tiny", adapters_root=str(root), max_batch_tokens=8, block_size=4)
    module: Any = build("llama")
    engine = build_engine(fit_model(module.to(DEVICE), None, "tiny"), config, NullObserver())
    try:
        await load(engine, "ladder")
        wanted = [request(p, name, 6, prompt_logprobs=VOCABULARY) for p in PROMPTS for name in ("ladder", "")]
        await ask_all(engine, wanted)
        return await ask_all(engine, wanted)
    finally:
        await engine.drain(0.0)


def test_ladder_and_base_rows(tmp_path: Path) -> None:
    torch.manual_seed(3)
    fields = ladder_fields(num_key_value_heads=1)
    tensors = ladder_tensors(fields, 48, 48, [0, 1, 2, 3])
    write(tmp_path / "ladder", fields, tensors)
    module = build("llama")
    model = PaperLadder(module, fields, tensors)
    got = asyncio.run(answers(tmp_path))
    for i, prompt in enumerate(PROMPTS):
        ladder, base = got[2 * i], got[2 * i + 1]
        torch.testing.assert_close(table(ladder), model.logprobs(prompt)[:-1], atol=3e-3, rtol=0)
        torch.testing.assert_close(table(base), logprobs(module, prompt)[:-1], atol=3e-3, rtol=0)
        assert ladder.ids == model.greedy(prompt, 6)
        assert base.ids == greedy(module, prompt, 6)
