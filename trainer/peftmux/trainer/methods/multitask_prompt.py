"""Multi-task prompt tuning (Wang et al., 2023, arXiv 2303.02861): one prompt for all tasks, times a low-rank matrix of
each task's own.

Rows of the data say which task they are of in a column `task`; a request says its number, the place of its name among
`task_names`. In PEFT the matrices start near zero, and with them every prompt; here they start near one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftmux.adapters.methods.multitask_prompt import COLUMNS, ROWS, task_prompts
from peftmux.trainer.data import Example
from peftmux.trainer.errors import OptionError
from peftmux.trainer.methods.base import AttachContext, AttachedAdapter, Method
from peftmux.trainer.methods.prompt import TENSOR, PromptConfig, initial_rows, prompt_fields, virtual_embeddings


@dataclass(frozen=True, kw_only=True)
class MultitaskPromptConfig(PromptConfig):
    """Prompt tuning's options, and the tasks."""

    tasks: list[str] | None = field(
        default=None, metadata={"help": "names of the tasks by number; default: those of the data, sorted"}
    )
    num_ranks: int = field(default=1, metadata={"help": "rank of a task's matrix"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_ranks < 1:
            raise OptionError("num-ranks", f"expected 1 or more, got {self.num_ranks}")


class TaskPrompts(nn.Module):
    """embeddings: [n, D], columns: [T, n, k], rows: [T, k, D] -> all prompts, [T * n, D]."""

    def __init__(self, shared: Tensor, tasks: int, rank: int, seed: int) -> None:
        super().__init__()
        n, width = shared.shape
        generator = torch.Generator().manual_seed(seed)
        self.embeddings = nn.Parameter(shared.detach().float().clone())
        self.columns = _near((tasks, n, rank), 1 / rank, generator, shared.device)
        self.rows = _near((tasks, rank, width), 1.0, generator, shared.device)

    def forward(self) -> Tensor:
        return task_prompts(self.embeddings, self.columns, self.rows).flatten(0, 1)


class MultitaskPromptAdapter(AttachedAdapter):
    """Each row begins with its task's virtual tokens, whose ids follow the vocabulary."""

    def __init__(self, model: Any, source: TaskPrompts, tasks: tuple[str, ...], fields: Mapping[str, object]) -> None:
        self._source, self._tasks = source, tasks
        path, change = virtual_embeddings(model, source)
        self._first = model.get_input_embeddings().num_embeddings
        super().__init__("multitask-prompt", model, {path: change}, fields, {"task prompts": source})

    def place(self, example: Example) -> Example:
        if example.task is None or str(example.task) not in self._tasks:
            raise OptionError("task", f"expected one of {', '.join(self._tasks)}, got {example.task!r}")
        length = len(self._source.embeddings)
        start = self._first + self._tasks.index(str(example.task)) * length
        return example.with_inserted([(0, range(start, start + length))])

    def tensors(self) -> dict[str, Tensor]:
        named = {TENSOR: self._source.embeddings, COLUMNS: self._source.columns, ROWS: self._source.rows}
        return {name: parameter.detach().cpu() for name, parameter in named.items()}


def _near(shape: tuple[int, ...], middle: float, generator: torch.Generator, device: torch.device) -> nn.Parameter:
    return nn.Parameter((middle + torch.randn(shape, generator=generator) * 0.02).to(device))


def _attach(model: Any, config: MultitaskPromptConfig, context: AttachContext) -> AttachedAdapter:
    found = {str(example.task) for example in context.examples if example.task is not None}
    tasks = tuple(config.tasks if config.tasks is not None else sorted(found))
    if not tasks or len(set(tasks)) != len(tasks):
        raise OptionError("tasks", f"expected rows with a column task, or different names; got {list(tasks)}")
    source = TaskPrompts(initial_rows(model, config, context), len(tasks), config.num_ranks, context.seed)
    fields = {
        **prompt_fields(model, "MULTITASK_PROMPT_TUNING", config.num_virtual_tokens),
        "prompt_tuning_init": "RANDOM",
        "num_tasks": len(tasks),
        "num_ranks": config.num_ranks,
        "task_names": list(tasks),
    }
    return MultitaskPromptAdapter(model, source, tasks, fields)


MULTITASK_PROMPT = Method(
    name="multitask-prompt",
    summary="one prompt for several tasks, with a small matrix for each",
    config_class=MultitaskPromptConfig,
    attach=_attach,
    learning_rate=lambda hidden_size: 1e-2,
    places_tokens=lambda config: True,
)
