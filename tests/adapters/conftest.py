"""Fixture bases, and an oracle: lowered parts run on a plain transformers model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from peftmux.adapters.parts import LoweredAdapter
from peftmux.adapters.torch_base import TorchBase
from peftmux.kernels.lowrank import LinearPart, apply_linear_part

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Bases and adapters as other libraries saved them."""
    return FIXTURES


@pytest.fixture(scope="session")
def load_base() -> Any:
    """(name, dtype) -> a fixture base; made once each. Eager attention, as the expected logits were."""

    @cache
    def load(name: str, dtype: torch.dtype = torch.float32) -> Any:
        path = FIXTURES / "base" / name
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()

    return load


@pytest.fixture(scope="session")
def llama(load_base: Any) -> TorchBase:
    return TorchBase(load_base("llama"))


@pytest.fixture(scope="session")
def qwen2(load_base: Any) -> TorchBase:
    return TorchBase(load_base("qwen2"))


@pytest.fixture(scope="session")
def adapted_logits() -> Any:
    """(module, lowered adapter, ids [rows, T]) -> logits [rows, T, vocabulary]."""
    return _logits


@contextmanager
def _linear_parts(module: nn.Module, adapter: LoweredAdapter) -> Iterator[None]:
    """Within it, every linear site of `module` also does what the adapter says."""

    def hook(part: LinearPart) -> Any:
        def change(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0]
            flat = apply_linear_part(output.reshape(-1, output.shape[-1]), x.reshape(-1, x.shape[-1]), part)
            return flat.view_as(output)

        return change

    handles = [module.get_submodule(s).register_forward_hook(hook(p)) for s, p in adapter.linear.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _logits(module: Any, adapter: LoweredAdapter, ids: Tensor) -> Tensor:
    """The adapted model's logits for unpadded rows `ids` [rows, T]: [rows, T, vocabulary]."""
    with _linear_parts(module, adapter):
        if adapter.prefix is None:
            plain: Tensor = module(input_ids=ids).logits
            return plain
        rows, length = ids.shape
        prefix = adapter.prefix
        stored = DynamicCache(config=module.config)
        for layer, (k, v) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            k, v = (t.to(module.dtype).transpose(0, 1).expand(rows, -1, -1, -1).contiguous() for t in (k, v))
            stored.update(k, v, layer)
        positions = torch.arange(prefix.first_position, prefix.first_position + length).expand(rows, -1)
        mask = torch.ones(rows, prefix.length + length, dtype=torch.long)
        out = module(input_ids=ids, past_key_values=stored, position_ids=positions, attention_mask=mask)
        prefixed: Tensor = out.logits
        return prefixed
