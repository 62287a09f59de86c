"""Short training through the real trainer already computes on inputs it has not seen."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
import torch

from peftmux.demo import BASE, make_base
from peftmux.demo.fit import fit
from peftmux.demo.recipes import RECIPES, write_rows
from peftmux.demo.show import Screen
from peftmux.demo.tasks import examples, is_held_out


def teacher_forced(model: torch.nn.Module, tokenizer: object, recipe: object, count: int) -> float:
    """The share of held-out rows that greedy decoding answers exactly: each token is the model's first choice."""
    held_out = examples(recipe.task, count, 7, held_out=True)  # type: ignore[attr-defined]
    chats = [(("user", example.prompt), ("assistant", example.completion)) for example in held_out]
    encoded = [make_base.encode(tokenizer, chat) for chat in chats]  # type: ignore[arg-type]
    ids, targets, _ = make_base.padded(encoded, 0)
    with torch.inference_mode():
        chosen = model(input_ids=ids[:, :-1], attention_mask=torch.ones_like(ids[:, :-1])).logits.argmax(-1)
    right = (chosen == targets[:, 1:]) | (targets[:, 1:] == make_base.IGNORED)
    return float(right.all(dim=1).float().mean())


@pytest.mark.parametrize(("name", "steps", "bound"), [("reverse", 100, 0.6), ("reverse-next", 100, 0.6)])
def test_a_short_run_learns_the_task(name: str, steps: int, bound: float, tmp_path: Path) -> None:
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    recipe = dataclasses.replace(recipe, training={**recipe.training, "max_steps": steps})
    out = io.StringIO()
    result = fit(recipe, BASE, tmp_path, Screen(out), 12)
    assert teacher_forced(result.model, result.tokenizer, recipe, 100) >= bound
    assert out.getvalue().count("\n") == 1
    assert f"{steps}/{steps}" in out.getvalue()
    assert {file.name for file in result.out.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_rows_hold_nothing_that_is_held_out(tmp_path: Path) -> None:
    for recipe in RECIPES:
        path = tmp_path / "rows.jsonl"
        write_rows(recipe, path)
        rows = [line.split('"content": "')[1].split('"')[0] for line in path.read_text().splitlines()]
        assert len(rows) == recipe.training["max_steps"] * recipe.training["per_device_train_batch_size"]
        assert len(set(rows)) == len(rows)
        assert not any(map(is_held_out, rows))
