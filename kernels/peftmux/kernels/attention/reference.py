"""Attention over a paged cache: the definition.

    s[i, j]  = cap(scale * q[i] . k[j]),             cap(s) = softcap * tanh(s / softcap), or s
    seen     = { j : j <= at(i)  and  at(i) - j < window },   at(i) = context - queries + i
    out[i]   = sum over seen j of exp(s[i, j]) v[j]  /  (exp(sink) + sum over seen j of exp(s[i, j]))

Source: scaled dot-product attention (Vaswani et al., 2017, arXiv 1706.03762); the window of Mistral 7B (arXiv
2310.06825), soft capping of Gemma 2 (arXiv 2408.00118), sinks without a value of gpt-oss (arXiv 2508.10925). Paging
(arXiv 2309.06180) only says where key j lies: block_table[j // block_size], at j % block_size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from peftmux.kernels.attention.rows import AttentionRows


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: AttentionRows,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q: [T, H, Dk], k_cache: [NB, BS, Hkv, Dk], v_cache: [NB, BS, Hkv, Dv], sinks: [H] -> [T, H, Dv].

    H is a multiple of Hkv: query head h reads head h // (H / Hkv). window None or 0 sees the whole context. Computed
    in float32 and rounded once; tokens past the last row give zeros.
    """
    out = q.new_zeros(q.shape[0], q.shape[1], v_cache.shape[3])
    for row, (queries, context) in enumerate(zip(rows.query_lens, rows.context_lens, strict=True)):
        start = rows.query_starts[row]
        slots, positions = rows.gather(row, row + 1, 0, k_cache.shape[1])
        index = torch.arange(context - queries, context, device=q.device)
        seen = visible(index, positions[0], window)
        out[start : start + queries] = attend(
            q[start : start + queries],
            read_cache(k_cache, slots[0]),
            read_cache(v_cache, slots[0]),
            seen,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
        )
    return out


def visible(index: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """Queries at cache index [..., Q] against keys at positions [..., S] (-1: none) -> bool [..., Q, S]."""
    at, key = index.unsqueeze(-1), positions.unsqueeze(-2)
    seen = (key <= at) & (key >= 0)
    return seen & (at - key < window) if window else seen


def read_cache(cache: Tensor, slots: Tensor) -> Tensor:
    """cache: [NB, BS, Hkv, D], slots: [...] into the flattened first two dimensions -> [..., Hkv, D]."""
    flat = cache.view(-1, *cache.shape[2:])
    return flat.index_select(0, slots.flatten()).view(*slots.shape, *cache.shape[2:])


def attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, *, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """The formula above on explicit scores.

    q: [..., Q, H, Dk], k: [..., S, Hkv, Dk], v: [..., S, Hkv, Dv], seen: [..., Q, S] -> [..., Q, H, Dv] in q's dtype.
    """
    groups = q.shape[-2] // k.shape[-2]
    grouped = q.float().reshape(*q.shape[:-2], k.shape[-2], groups, q.shape[-1])
    scores = torch.einsum("...qhgd,...shd->...hgqs", grouped, k.float()) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen[..., None, None, :, :], -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(-1, groups, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[-3]]
    out = torch.einsum("...hgqs,...shd->...qhgd", weights, v.float())
    return out.flatten(-3, -2).to(q.dtype)
