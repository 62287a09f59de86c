"""Served == AdapterHub's own logits: alone, and all in one batch with PEFT's adapters and base rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peftmux.kernels import native
from peftmux.runtime.engine.api import ClassificationRequest
from tests.engine.harness import FIXTURES, Answer, ask, ask_all, check_quiet, load, request, running
from tests.folders import GENERATES
from tests.parity.fixtures import _cases
from tests.parity.test_parity_served import TOLERANCE, VOCABULARY, table

FOLDERS = [name for name in GENERATES if name.startswith("adapterhub/")]
BESIDE = ["lora", "lora_dora", "ia3", "prefix"]
SETTINGS: dict[str, dict[str, Any]] = {
    "cached": {"block_size": 4},
    "chunked": {"block_size": 4, "max_batch_tokens": 4},
    "torch": {"block_size": 4},
}


def name_of(folder: str) -> str:
    return "hub-" + folder.rsplit("/", 1)[1]


def wanted(folder: str) -> list[tuple[list[int], torch.Tensor]]:
    expected = load_file(Path(FIXTURES, folder, "expected.safetensors"))
    return [
        (ids.tolist(), logits.float().log_softmax(-1))
        for ids, logits in zip(expected["input_ids"], expected["logits"], strict=True)
    ]


def check(answer: Answer, logprobs: torch.Tensor) -> None:
    torch.testing.assert_close(table(answer), logprobs[:-1], rtol=0, atol=TOLERANCE)
    assert answer.ids[0] == int(logprobs[-1].argmax())


@pytest.mark.parametrize("settings", SETTINGS)
async def test_alone_and_together(settings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if settings == "torch":
        monkeypatch.setattr(native, "load", lambda: None)
    async with running(adapters_root=str(FIXTURES), **SETTINGS[settings]) as engine:
        usage = engine.stats().kv_cache_usage
        for folder in FOLDERS:
            info = await load(engine, folder, name_of(folder))
            assert info.kind == GENERATES[folder]
        for folder in BESIDE:
            await load(engine, f"peft/llama/{folder}", folder)
        jobs = [(name_of(folder), ids, logprobs) for folder in FOLDERS for ids, logprobs in wanted(folder)]
        jobs += [(folder, c.ids, c.logprobs) for folder in BESIDE for c in _cases("llama", folder)]
        for name, ids, logprobs in jobs:
            check(await ask(engine, request(ids, name, 1, prompt_logprobs=VOCABULARY)), logprobs)
        base = [request(jobs[0][1], "", 1, prompt_logprobs=VOCABULARY)]
        plain = await ask(engine, base[0])
        answers = await ask_all(
            engine, [request(ids, name, 1, prompt_logprobs=VOCABULARY) for name, ids, _ in jobs] + base
        )
        for answer, (_, _, logprobs) in zip(answers, jobs, strict=False):
            check(answer, logprobs)
        torch.testing.assert_close(table(answers[-1]), table(plain), rtol=0, atol=1e-5)
        assert (table(plain) - jobs[0][2][:-1]).abs().max() > 30 * TOLERANCE, "the adapter would be invisible"
        for folder in FOLDERS:
            await engine.unload_adapter(name_of(folder))
        for folder in BESIDE:
            await engine.unload_adapter(folder)
        await check_quiet(engine, usage)


async def test_a_head_of_two_layers() -> None:
    folder = "adapterhub/llama/pfeiffer_with_head"
    expected = load_file(Path(FIXTURES, folder, "expected.safetensors"))
    async with running(adapters_root=str(FIXTURES)) as engine:
        await load(engine, folder, "a")
        for ids, logits in zip(expected["input_ids"], expected["logits"], strict=True):
            answer = await engine.classify(ClassificationRequest(tuple(ids.tolist()), "a"))
            assert answer.names == ("LABEL_0", "LABEL_1", "LABEL_2")
            (row,) = answer.logits
            torch.testing.assert_close(torch.tensor(row), logits, rtol=0, atol=TOLERANCE)
