"""What is compared: every method that `peftmux train` has, with its defaults, and the tasks that it is trained on."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peftmux.demo.tasks import TASKS, Example, Task, draws, examples, letters
from peftmux.trainer.methods import METHODS

TOLD, NEW = "reverse", "reverse-next"
"""A task that the base does when it is told to, and one that it was never taught. No adapter's data tell."""
CLASSES = "earliest"
"""Where the earliest of the letters stands: the task of classifiers."""
STEPS: Mapping[str, Mapping[str, int]] = {
    "base": {TOLD: 500, CLASSES: 500, NEW: 1000},
    "small": {TOLD: 250, CLASSES: 250, NEW: 250},
}
"""Of every run by base and task, whatever the method."""
BATCH = 16
"""Rows of a step; no row is seen twice."""
TRAINING: Mapping[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "lr_scheduler_type": "linear",
    "warmup_steps": 10,
    "seed": 0,
    "disable_tqdm": True,
}
"""Beside the steps and a method's own defaults: the learning rate is the method's."""
HELD_OUT, EVALUATION_SEED = 200, 7
BESIDE = "sort"
"""What methods that learn several tasks, or fuse adapters of several, learn beside the one they are scored on."""
NOT_HERE = {
    "vora": "takes images, and the demo's tasks have none. What it trains in the base's layers, unscaled pairs of rank "
    "64, is LoRA where there is only text: the row `vora's pairs`",
}

Kind = Literal["generation", "sequence"]


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table. `method`: "" is the base without an adapter."""

    name: str
    method: str
    config: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: Kind = "generation"
    several: bool = False
    """Its rows name their tasks, of which there are two."""
    fuses: str = ""
    """The method of the two adapters that are trained first."""
    needs: str = ""
    """A package."""

    @property
    def tasks(self) -> tuple[str, ...]:
        return (TOLD, NEW) if self.kind == "generation" else (CLASSES,)

    @property
    def installed(self) -> bool:
        return not self.needs or importlib.util.find_spec(self.needs) is not None


_SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "fusion": {"fuses": "pfeiffer"},
    "multitask-prompt": {"several": True},
    "p-tuning-v2": {"kind": "sequence"},
    "head": {"kind": "sequence"},
}
_VARIANTS = (
    Case("lora, classifier", "lora", kind="sequence"),
    Case("qlora", "lora", options={"quantization": "nf4"}, needs="bitsandbytes"),
    Case("vora's pairs", "lora", {"r": 64, "lora_alpha": 64}),
    Case("houlsby, AdapterDrop", "houlsby", {"adapterdrop": 1, "drop_first": 1}),
    Case("prefix, projected", "prefix", {"prefix_projection": True}),
    Case("p-tuning, LSTM", "p-tuning", {"encoder_reparameterization_type": "LSTM"}),
    Case("p-tuning, in the prompt", "p-tuning", {"template": ["20@3"]}),
)


def cases() -> list[Case]:
    """The base, then all methods in the trainer's order, each followed by its variants."""
    found = [Case("base", ""), Case("base, told", "")]
    for name in METHODS:
        if name not in NOT_HERE:
            found.append(Case(name, name, **_SPECIAL.get(name, {})))
            found += [case for case in _VARIANTS if case.method == name]
    return found


def write_rows(case: Case, task: str, steps: int, folder: Path) -> Path:
    """JSON lines for a run of so many steps, nothing that is held out."""
    count, path = steps * BATCH, folder / f"{task}.jsonl"
    if case.kind == "sequence":
        rows: Iterator[dict[str, Any]] = ({"text": e.prompt, "label": e.completion} for e in labelled(count, False))
    elif case.several:
        each = [examples(TASKS[name], count // 2, 0, held_out=False) for name in (task, BESIDE)]
        pairs = zip(*each, strict=True)
        rows = (_chat(e) | {"task": name} for pair in pairs for name, e in zip((task, BESIDE), pair, strict=True))
    else:
        rows = map(_chat, examples(TASKS[task], count, 0, held_out=False))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def held_out(task: str) -> list[Example]:
    if task == CLASSES:
        return labelled(HELD_OUT, True)
    return examples(TASKS[task], HELD_OUT, EVALUATION_SEED, held_out=True)


def task_number(case: Case, task: str) -> int | None:
    """What a request of a method with several tasks says: names are numbered in their order."""
    return sorted((task, BESIDE)).index(task) if case.several else None


def told(task: str, prompt: str) -> str:
    """With an instruction, as the base was trained; a new task has none, and the prompt stays as it is."""
    instructions = TASKS[task].instructions
    return f"{instructions[0]} {prompt}" if instructions else prompt


def earliest(text: str) -> str:
    return ("first", "second", "third", "later")[min(text.index(min(text)), 3)]


_CLASSIFIED = Task(CLASSES, "where the earliest letter stands", letters, earliest)


def labelled(count: int, out: bool) -> list[Example]:
    """Different texts, each with the name of the place of its earliest letter."""
    found: dict[str, str] = {}
    for text in draws(_CLASSIFIED, random.Random(f"{CLASSES}/{out}"), held_out=out):
        found[text] = _CLASSIFIED.answer(text)
        if len(found) == count:
            break
    return [Example(*pair) for pair in found.items()]


def _chat(example: Example) -> dict[str, Any]:
    turns: Sequence[tuple[str, str]] = (("user", example.prompt), ("assistant", example.completion))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}
