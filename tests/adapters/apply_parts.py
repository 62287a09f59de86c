"""Run lowered parts on a plain transformers model: the oracle that the engine is compared with too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from peftmux.adapters.parts import LoweredAdapter
from peftmux.kernels.lowrank import LinearPart, apply_linear_part

FIXTURES = Path(__file__).parent.parent / "fixtures"


def load_base(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A fixture base, e.g. "llama"."""
    return AutoModelForCausalLM.from_pretrained(FIXTURES / "base" / name, dtype=dtype).eval()


@contextmanager
def linear_parts(module: nn.Module, adapter: LoweredAdapter) -> Iterator[None]:
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
def logits(module: Any, adapter: LoweredAdapter, ids: Tensor) -> Tensor:
    """The adapted model's logits for unpadded rows `ids` [rows, T]: [rows, T, vocabulary]."""
    with linear_parts(module, adapter):
        if adapter.prefix is None:
            return module(input_ids=ids).logits
        rows, length = ids.shape
        prefix = adapter.prefix
        cache = DynamicCache(config=module.config)
        for layer, (k, v) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            k, v = (t.to(module.dtype).transpose(0, 1).expand(rows, -1, -1, -1).contiguous() for t in (k, v))
            cache.update(k, v, layer)
        positions = torch.arange(prefix.first_position, prefix.first_position + length).expand(rows, -1)
        mask = torch.ones(rows, prefix.length + length, dtype=torch.long)
        return module(input_ids=ids, past_key_values=cache, position_ids=positions, attention_mask=mask).logits
