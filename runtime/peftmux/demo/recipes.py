"""The demo's three adapters: which method learns which task, from how much, for how long."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftmux.demo.tasks import TASKS, Task, examples


@dataclass(frozen=True, slots=True)
class Recipe:
    """One adapter. `config` and `training` are what `peftmux train METHOD` takes."""

    name: str
    method: str
    task: Task
    config: Mapping[str, Any]
    training: Mapping[str, Any]


def _training(steps: int, learning_rate: float) -> dict[str, Any]:
    return {
        "max_steps": steps,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": 32,
        "lr_scheduler_type": "linear",
        "warmup_steps": 10,
        "weight_decay": 0.0,
        "seed": 0,
    }


RECIPES = (
    Recipe("sort-down", "lora", TASKS["sort-down"], {"r": 16, "lora_alpha": 32}, _training(600, 3e-3)),
    Recipe("reverse-next", "dora", TASKS["reverse-next"], {"r": 16, "lora_alpha": 32}, _training(250, 3e-3)),
    Recipe("reverse", "prefix", TASKS["reverse"], {"num_virtual_tokens": 32}, _training(200, 1e-1)),
)
"""Two tasks the base was never taught, which low-rank updates learn; a prefix elicits one it can do when told to."""


def write_rows(recipe: Recipe, path: Path, seed: int = 0) -> None:
    """JSON lines of {"messages"}: the bare input and its answer, no instruction, nothing that is held out.

    As many rows as the run takes, so that it sees none twice.
    """
    rows = recipe.training["max_steps"] * recipe.training["per_device_train_batch_size"]
    with open(path, "w", encoding="utf-8") as file:
        for example in examples(recipe.task, rows, seed, held_out=False):
            messages = [
                {"role": "user", "content": example.prompt},
                {"role": "assistant", "content": example.completion},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
