"""Broken prompt, P-Tuning and multi-task adapters: each is refused with its reason, saying expected and got."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from peftmux.adapters.errors import Reason
from peftmux.adapters.lower import load_adapter
from tests.adapters.damage import Damage, add, check_refused, edit_config, nan, remove, rename, set_tensor

E = "prompt_embeddings"
PROMPT: dict[str, tuple[Reason, str, Damage]] = {
    "no tensor": (Reason.MISSING_TENSOR, E, remove(E)),
    "renamed": (Reason.MISSING_TENSOR, E, rename(E, "prompt_embedding")),
    "too few tokens": (Reason.SHAPE_MISMATCH, "[5, 32]", set_tensor(E, lambda t: t[:4])),
    "too many tokens": (Reason.SHAPE_MISMATCH, "[4, 32]", edit_config(num_virtual_tokens=4)),
    "another width": (Reason.SHAPE_MISMATCH, "[5, 32] for this base, got [5, 31]", set_tensor(E, lambda t: t[:, 1:])),
    "token_dim of another base": (Reason.SHAPE_MISMATCH, "token_dim: expected 32", edit_config(token_dim=64)),
    "no count": (Reason.INVALID_FIELD, "num_virtual_tokens", edit_config(num_virtual_tokens=None)),
    "count of zero": (Reason.INVALID_FIELD, "num_virtual_tokens", edit_config(num_virtual_tokens=0)),
    "count a text": (Reason.INVALID_FIELD, "num_virtual_tokens", edit_config(num_virtual_tokens="5")),
    "encoder and decoder": (Reason.UNSUPPORTED_FIELD, "num_trans", edit_config(num_transformer_submodules=2)),
    "NaN": (Reason.NOT_FINITE, E, set_tensor(E, nan)),
    "an extra tensor": (Reason.UNUSED_TENSOR, "prefix_task_cols", add("prefix_task_cols", 3, 5, 1)),
    "an unknown field": (Reason.UNSUPPORTED_FIELD, "prompt_scale", edit_config(prompt_scale=2.0)),
    "a seq2seq task": (Reason.UNSUPPORTED_TASK, "SEQ_2_SEQ_LM", edit_config(task_type="SEQ_2_SEQ_LM")),
    "a saved module": (Reason.UNSUPPORTED_FIELD, "modules_to_save", edit_config(modules_to_save=["lm_head"])),
}
COLS, ROWS = "prefix_task_cols", "prefix_task_rows"
HUGE = 3e38
MULTITASK: dict[str, tuple[Reason, str, Damage]] = {
    "no columns": (Reason.MISSING_TENSOR, COLS, remove(COLS)),
    "no rows": (Reason.MISSING_TENSOR, ROWS, remove(ROWS)),
    "a task less": (Reason.SHAPE_MISMATCH, "[3, 5, 1]", set_tensor(COLS, lambda t: t[:2])),
    "tasks of the config": (Reason.SHAPE_MISMATCH, "[2, 5, 1]", edit_config(num_tasks=2)),
    "ranks of the config": (Reason.SHAPE_MISMATCH, "[3, 5, 2]", edit_config(num_ranks=2)),
    "ranks that differ": (Reason.SHAPE_MISMATCH, ROWS, set_tensor(ROWS, lambda t: t.repeat(1, 2, 1))),
    "no tasks": (Reason.INVALID_FIELD, "num_tasks", edit_config(num_tasks=0)),
    "read as one prompt": (
        Reason.UNUSED_TENSOR,
        COLS,
        edit_config(peft_type="PROMPT_TUNING", num_tasks=None, num_ranks=None, prompt_tuning_init_task=None),
    ),
    "overflows": (Reason.NOT_FINITE, "virtual tokens", set_tensor(COLS, lambda t: torch.full_like(t, HUGE))),
}


@pytest.mark.parametrize("folder", ["prompt_random", "ptuning_mlp"])
@pytest.mark.parametrize("case", PROMPT)
def test_broken_prompts_are_refused(case, folder, fixtures, llama, tmp_path):
    check_refused(fixtures / "peft/llama" / folder, tmp_path / "adapter", llama, PROMPT[case])


@pytest.mark.parametrize("case", MULTITASK)
def test_broken_multitask_prompts_are_refused(case, fixtures, llama, tmp_path):
    good = tmp_path / "good"
    shutil.copytree(fixtures / "peft/llama/multitask_prompt", good)
    set_tensor(E, lambda t: t * 1000)(good)
    check_refused(good, tmp_path / "adapter", llama, MULTITASK[case])


def test_one_task_is_still_named(fixtures, llama, tmp_path):
    """Files of one task, which PEFT's defaults mean by leaving num_tasks out."""
    folder = tmp_path / "adapter"
    shutil.copytree(fixtures / "peft/llama/multitask_prompt", folder)
    for name in (COLS, ROWS):
        set_tensor(name, lambda t: t[:1])(folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["num_tasks"], config["num_ranks"]
    path.write_text(json.dumps(config))
    virtual = load_adapter(folder, llama).parts.virtual
    assert virtual is not None
    assert (virtual.tasks, virtual.length) == (1, 5)


def test_a_prompt_is_one_part_at_the_input(fixtures, llama):
    adapter = load_adapter(fixtures / "peft/llama/prompt_text", llama)
    assert adapter.parts.virtual is not None
    assert adapter.parts.virtual.embeddings.shape == (1, 6, llama.embedding_width)
    assert (adapter.applied_sites, adapter.tensors, adapter.ranks) == (1, 1, (0, 0))
