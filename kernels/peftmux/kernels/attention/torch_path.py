"""Paged attention by torch's own operators: decode rows as one padded product, every other row by itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from peftmux.kernels.attention.reference import attend, read_cache
from peftmux.kernels.attention.rows import AttentionRows

_SCORES_AT_ONCE = 1 << 24
"""How many float32 scores explicit attention may hold: 64 MB."""


def paged_attention_torch(
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
    """As `reference.paged_attention`."""
    out = q.new_zeros(q.shape[0], q.shape[1], v_cache.shape[3])
    spans = [(0, rows.num_decode)] if rows.num_decode else []
    spans += [(r, r + 1) for r in range(rows.num_decode, len(rows.query_lens))]
    for first, last in spans:
        attend_rows(out, q, k_cache, v_cache, rows, first, last, scale, window, softcap, sinks)
    return out


def attend_rows(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: AttentionRows,
    first: int,
    last: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Rows first .. last, which have equally many queries, into their tokens of `out`."""
    keys = (first, last, window or 0, k_cache.shape[1])
    slots, _ = rows.gather(*keys)
    k, v = read_cache(k_cache, slots), read_cache(v_cache, slots)  # [rows, S, Hkv, D]
    start, end = rows.query_starts[first], rows.query_starts[last]
    queries = q[start:end].reshape(last - first, -1, *q.shape[1:])  # [rows, Q, H, Dk]
    if softcap is not None or sinks is not None:
        found = _attend_in_pieces(queries, k, v, rows.seen(*keys), scale, softcap, sinks)
    elif queries.shape[1] == 1:
        found = _decode(queries, k, v, rows.seen(*keys), scale)
    else:
        causal = rows.query_lens[first] == rows.context_lens[first] and not window
        found = _prefill(queries, k, v, None if causal else rows.seen(*keys), scale)
    out[start:end] = found.flatten(0, 1)


def _decode(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """One query a row: the query heads of a group stand in SDPA's query dimension, so keys are never repeated."""
    grouped = q.reshape(q.shape[0], k.shape[2], -1, q.shape[3])  # [rows, Hkv, G, Dk]
    out = scaled_dot_product_attention(
        grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen.unsqueeze(1), scale=scale
    )
    return out.flatten(1, 2).unsqueeze(1)


def _prefill(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """One row; seen None: no past and no window, plain causal."""
    out = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if seen is None else seen.unsqueeze(1),
        is_causal=seen is None,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _attend_in_pieces(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Explicit scores, some queries at a time."""
    step = max(1, _SCORES_AT_ONCE // (q.shape[0] * q.shape[2] * k.shape[1]))
    pieces = [
        attend(
            q[:, i : i + step],
            k,
            v,
            seen[:, i : i + step],
            scale=scale,
            softcap=softcap,
            sinks=sinks,
        )
        for i in range(0, q.shape[1], step)
    ]
    return torch.cat(pieces, dim=1)
