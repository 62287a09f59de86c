"""The attention function that transformers' models call: keys and values go to the paged cache, queries read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from peftmux.kernels.attention import AttentionPath
from peftmux.runtime.model.step import StepState

IMPLEMENTATION = "peftmux_paged"


@dataclass(slots=True)
class PagedLayer:
    """One attention layer's cache. Set on the attention module as `paged` when the model is given a cache."""

    k_cache: Tensor
    """[blocks, block_size, kv_heads, key_dim]."""
    v_cache: Tensor
    """[blocks, block_size, kv_heads, value_dim]."""
    step: StepState
    path: AttentionPath


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. query: [1, H, T, D], key and value: [1, Hkv, T, D] -> [1, T, H, Dv].

    Which other keyword arguments may arrive is settled when the model is probed (`discover`).
    """
    layer: PagedLayer = module.paged  # type: ignore[assignment]
    step = layer.step.inputs
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [T, H, D]
    layer.path.write_kv(k, v, layer.k_cache, layer.v_cache, step.slots)
    out = layer.path.attend(
        q,
        layer.k_cache,
        layer.v_cache,
        step.rows,
        scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out.unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, paged_attention_forward)
