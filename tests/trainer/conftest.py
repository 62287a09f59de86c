"""Saved bases that runs load from disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from tests.trainer.tiny_models import COMMON, HEADS, build_tokenizer, copy_task, save_base, teach, write_rows


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny Qwen2 and its tokenizer."""
    return save_base(tmp_path_factory.mktemp("base") / "qwen2", "qwen2")


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that answers "up ab=" with "AB" and "copy ab=" with "ab"; made in a few seconds."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**{**COMMON, **HEADS, "initializer_range": 0.05}))
    up = [{"prompt": f"up {row['prompt']}", "completion": row["completion"]} for row in copy_task(256)]
    copy = [{"prompt": f"copy {row['prompt']}", "completion": row["completion"].lower()} for row in copy_task(256, 1)]
    teach(model, up + copy)
    folder = tmp_path_factory.mktemp("base") / "taught"
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 rows of the copy task."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", copy_task(64))
