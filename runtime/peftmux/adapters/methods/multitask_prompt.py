"""Multi-task prompt tuning: task t's virtual tokens are P * (U_t V_t), one prompt and a low-rank mask for each task.

Source: Wang et al., 2023, arXiv 2303.02861. PEFT stores P as `prompt_embeddings` [n, D], U as `prefix_task_cols`
[tasks, n, k] and V as `prefix_task_rows` [tasks, k, D]. A request says which task it is of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import FieldTable, Honoured, NoEffect, is_positive_int, read_fields
from peftmux.adapters.methods import prompt
from peftmux.adapters.methods.ledger import Ledger
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes
from peftmux.adapters.parts import VirtualTokens

COLUMNS, ROWS = "prefix_task_cols", "prefix_task_rows"

FIELDS: FieldTable = {
    **prompt.FIELDS,
    "num_tasks": Honoured(1, is_positive_int, prompt.COUNT),
    "num_ranks": Honoured(1, is_positive_int, prompt.COUNT),
    "prompt_tuning_init_state_dict_path": NoEffect("initialisation"),
    "prompt_tuning_init_task": NoEffect("initialisation"),
    "task_names": NoEffect("names for people; a request says a task's number"),
}


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and the three tensors against the base's embeddings."""
    fields = read_fields(config, FIELDS)
    ledger = Ledger(shapes)
    length, width = prompt.claim_prompt(fields, ledger, base)
    tasks, rank = fields["num_tasks"], fields["num_ranks"]
    ledger.claim(COLUMNS, (tasks, length, rank))
    ledger.claim(ROWS, (tasks, rank, width))
    ledger.close()
    return Plan("multitask-prompt", _build)


def task_prompts(shared: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """The definition above: [n, D], [tasks, n, k], [tasks, k, D] -> [tasks, n, D]. Differentiable."""
    return shared * torch.matmul(columns, rows)


def _build(tensors: Mapping[str, Tensor]) -> Parts:
    prompts = task_prompts(tensors[prompt.TENSOR], tensors[COLUMNS], tensors[ROWS])
    return Parts(virtual=VirtualTokens(prompts, by_task=True))


METHOD = Method("MULTITASK_PROMPT_TUNING", plan, lambda base: ("multitask-prompt",))
