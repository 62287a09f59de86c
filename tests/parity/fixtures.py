"""The adapters that PEFT saved, with the logits and greedy tokens that PEFT itself computed for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from tests.engine.harness import FIXTURES
from tests.folders import GENERATES, HALF, TASKS

INVOCATION = [9, 10]
"""Of lora_alora, which leaves a prompt without it to the base."""


@dataclass(frozen=True, slots=True)
class Case:
    """Row `row` of one folder's expected values."""

    base: str
    folder: str
    row: int
    ids: list[int]
    logprobs: Tensor
    """[T, V] float32, of the real tokens."""
    greedy: list[int]
    task: int | None = None

    @property
    def invoked(self) -> bool:
        """Whether the adapter does anything to this prompt."""
        pairs = [self.ids[i : i + 2] for i in range(len(self.ids))]
        return self.folder != "lora_alora" or INVOCATION in pairs

    def __str__(self) -> str:
        return f"{self.folder}[{self.row}]"


def folders(base: str, *, half: bool = False) -> list[str]:
    """Of every adapter that generates; `half`: those made on a bfloat16 base."""
    return sorted(name.split("/")[2] for name in (HALF if half else GENERATES) if name.startswith(f"peft/{base}/"))


def task_of(base: str, folder: str, row: int = 0) -> int | None:
    """None where the adapter has no tasks."""
    tasks = TASKS.get(f"peft/{base}/{folder}")
    return tasks[row] if tasks else None


def cases(base: str, *, half: bool = False) -> list[Case]:
    return [case for folder in folders(base, half=half) for case in _cases(base, folder)]


def _cases(base: str, folder: str) -> list[Case]:
    expected = load_file(Path(FIXTURES, "peft", base, folder, "expected.safetensors"))
    return [
        Case(
            base,
            folder,
            row,
            ids.tolist(),
            logits[-len(ids) :].float().log_softmax(-1),
            greedy.tolist(),
            task_of(base, folder, row),
        )
        for row, (ids, logits, greedy) in enumerate(
            zip(expected["input_ids"], expected["logits"], expected["greedy_ids"], strict=True)
        )
    ]
