"""A merged checkpoint says what the server says with the adapter: of every fixture folder, or it is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from peftmux.cli.main import main
from tests.engine.harness import adapters, ask, base, load, request, running
from tests.parity.fixtures import folders, task_of
from tests.parity.test_parity_served import TOLERANCE, VOCABULARY, table

PROMPT = [5, 9, 17, 33, 60, 7, 44, 12, 80, 21]
KEPT_APART = {
    *("lora_alora", "multitask_prompt", "prefix", "prefix_projection", "prompt_random", "prompt_text"),
    *("prompt_vocab", "ptuning_lstm", "ptuning_mlp", "beft", "lora_bias_term"),
}
"""Folders that are no change of weights: virtual tokens, invocations, and a bias where the base has none."""


@pytest.mark.parametrize("name", ["llama", "qwen2"])
async def test_merged_is_served(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apart = set()
    async with running(name) as engine:
        for folder in folders(name):
            out = tmp_path / folder
            words = ["adapters", "merge", str(Path(adapters(name)) / folder), "--model", base(name), "--out", str(out)]
            if main([*words, "--dtype", "float32"]) != 0:
                message = capsys.readouterr().err
                assert "cannot be merged into the base's weights" in message, message
                assert not out.exists()
                apart.add(folder)
                continue
            await load(engine, folder)
            task = task_of(name, folder)
            answer = await ask(engine, request(PROMPT, folder, prompt_logprobs=VOCABULARY, task=task))
            merged = AutoModelForCausalLM.from_pretrained(out)
            with torch.inference_mode():
                logits = merged(input_ids=torch.tensor([PROMPT])).logits[0, :-1]
            torch.testing.assert_close(logits.log_softmax(-1), table(answer), rtol=0, atol=TOLERANCE, msg=folder)
            await engine.unload_adapter(folder)
    assert apart == KEPT_APART & set(folders(name))
