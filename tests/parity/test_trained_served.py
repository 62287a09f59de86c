"""What the trainer's model says is what the server answers: same files, same numbers, for every trainable method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from peftmux.trainer import train
from tests.engine.harness import ask_all, base, load, request, running
from tests.parity.test_parity_served import table

WORDS = [f"w{i}" for i in range(4, 60)]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "rslora": {"r": 4, "lora_alpha": 4},
    "dora": {"r": 4},
    "prefix": {"num_virtual_tokens": 5},
    "ladder": {"reduction_factor": 2},
}
PROMPTS = ([5, 9, 17, 33, 60, 7], [44, 12, 80], [21] * 19)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": " ".join(WORDS[i : i + 4]), "completion": " " + WORDS[i + 7]} for i in range(32)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


async def test_trained_is_served(data: Path, tmp_path: Path) -> None:
    models = {}
    for method, config in METHODS.items():
        result = train(
            method,
            model=base(),
            data=data,
            out=tmp_path / method,
            config=config,
            training={"max_steps": 6, "learning_rate": 2e-2, "per_device_train_batch_size": 8, "disable_tqdm": True},
        )
        models[method] = result.model
    async with running(adapters_root=str(tmp_path)) as engine:
        for method in METHODS:
            await load(engine, method)
        jobs = [(method, prompt) for prompt in PROMPTS for method in METHODS]
        answers = await ask_all(engine, [request(p, m, max_tokens=1, prompt_logprobs=96) for m, p in jobs])
    plain: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for (method, prompt), answer in zip(jobs, answers, strict=True):
        served = table(answer)
        with torch.inference_mode():
            logits = models[method](input_ids=torch.tensor([prompt])).logits[0].float()
        trained = logits.log_softmax(-1)[: len(served)]
        torch.testing.assert_close(served, trained, atol=1e-4, rtol=0)
        plain.setdefault(tuple(prompt), []).append(served)
    for tables in plain.values():  # the methods really differ from each other
        assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(tables) for b in tables[:i])
