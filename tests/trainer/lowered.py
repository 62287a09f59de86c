"""What an adapter's files lower to, run on a plain transformers model: the trained model must equal it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from peftmux.adapters.parts import KVPrefix, LoweredAdapter
from peftmux.kernels.lowrank import LinearPart, apply_linear_part


@torch.no_grad()
def lowered_logits(model: Any, adapter: LoweredAdapter, ids: Tensor) -> Tensor:
    """Logits [rows, T, vocabulary] of unpadded rows `ids` [rows, T]. `model` is left with the adapter in it."""
    for name, part in adapter.parts.linear.items():
        model.get_submodule(name).register_forward_hook(_apply(part))
    past = _cache(adapter.parts.prefix, ids.shape[0]) if adapter.parts.prefix else None
    start = adapter.parts.prefix.first_position if adapter.parts.prefix else 0
    positions = torch.arange(start, start + ids.shape[1])[None].expand_as(ids)
    mask = torch.ones(ids.shape[0], (adapter.parts.prefix.length if adapter.parts.prefix else 0) + ids.shape[1])
    logits: Tensor = model(
        input_ids=ids, past_key_values=past, position_ids=positions, attention_mask=mask, use_cache=past is not None
    ).logits
    return logits


def _apply(part: LinearPart) -> Any:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        y = apply_linear_part(output.reshape(-1, output.shape[-1]), x.reshape(-1, x.shape[-1]), part)
        return y.view_as(output)

    return hook


def _cache(prefix: KVPrefix, rows: int) -> DynamicCache:
    cache = DynamicCache()
    for layer, (k, v) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(_stacked(k, rows), _stacked(v, rows), layer)
    return cache


def _stacked(tensor: Tensor, rows: int) -> Tensor:
    """[n, kv_heads, head_dim] -> [rows, kv_heads, n, head_dim]."""
    return tensor.transpose(0, 1).expand(rows, -1, -1, -1)
