"""Adapters that are mixtures, made here (no library writes them for these bases), and how to serve and compare them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.engine.harness import Answer
from tests.model.families import VOCABULARY

EXPERTS, RANK, ALPHA = 3, 4, 10.0


def config(**fields: Any) -> dict[str, Any]:
    return {
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "num_experts": EXPERTS,
        "bias": "none",
        "lora_dropout": 0.05,
        **fields,
    }


def write(folder: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def sizes(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    rows, columns = layer.weight.shape  # type: ignore[union-attr, operator, misc]
    return (rows, columns) if isinstance(layer, Conv1D) else (columns, rows)


def random(*shape: int) -> Tensor:
    scale: float = shape[-1] ** -0.5
    return torch.randn(*shape) * scale


@contextmanager
def hooked(module: nn.Module, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Forward hooks (module, inputs, output) -> output by path."""
    handles = [module.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def logprobs(module: Any, ids: Sequence[int]) -> Tensor:
    """[T, V]."""
    logits: Tensor = module(input_ids=torch.tensor([list(ids)])).logits[0]
    return logits.log_softmax(-1)


def table(answer: Answer) -> Tensor:
    """[T - 1, V]: the distributions that predict the prompt's second token and those after it."""
    rows = torch.full((len(answer.prompt_logprobs) - 1, VOCABULARY), torch.nan)
    for row, entry in zip(rows, answer.prompt_logprobs[1:], strict=True):
        ids, values = zip(*entry.top, strict=True)
        row[list(ids)] = torch.tensor(values)
    return rows
