"""What is written into the paged cache. k_cache: [NB, BS, Hkv, Dk], v_cache: [NB, BS, Hkv, Dv], both contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from peftmux.kernels.attention.rows import AttentionRows


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Store token t at slots[t] = block * BS + offset. k: [T, Hkv, Dk], v: [T, Hkv, Dv], slots: [T] int64, distinct."""
    k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slots, k)
    v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slots, v)


def copy_blocks(k_cache: Tensor, v_cache: Tensor, copies: Tensor) -> None:
    """Copy whole blocks; every source is read before any destination is written.

    copies: [n, 2] int64 on the cache's device, (source, destination).
    """
    sources, destinations = copies.unbind(1)
    k_cache[destinations] = k_cache[sources]
    v_cache[destinations] = v_cache[sources]


def check_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, rows: AttentionRows, dtype: torch.dtype) -> None:
    """What every form that reads memory by itself asks of `reference.paged_attention`'s arguments."""
    tokens, heads, key_dim = q.shape
    if not q.dtype is k_cache.dtype is v_cache.dtype is dtype:
        raise ValueError(f"expected {dtype}, got {q.dtype}, {k_cache.dtype} and {v_cache.dtype}")
    if k_cache.shape != (*v_cache.shape[:3], key_dim) or heads % v_cache.shape[2] or tokens < rows.num_tokens:
        raise ValueError(
            f"expected q [T >= {rows.num_tokens}, H, Dk] and caches [NB, BS, Hkv, D] with H a multiple of Hkv, "
            f"got {tuple(q.shape)}, {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    _check_contiguous(k_cache, v_cache)


def check_store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, dtype: torch.dtype) -> None:
    """The same of `write_kv`'s."""
    if not k.dtype is v.dtype is k_cache.dtype is v_cache.dtype is dtype or slots.dtype is not torch.int64:
        raise ValueError(f"expected {dtype} and int64 slots, got {k.dtype}, {v.dtype}, {k_cache.dtype}")
    if k_cache.shape[2:] != k.shape[1:] or v_cache.shape[2:] != v.shape[1:] or slots.shape != k.shape[:1]:
        raise ValueError(
            f"expected k, v and slots that fit caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)}, "
            f"got {tuple(k.shape)}, {tuple(v.shape)} and {tuple(slots.shape)}"
        )
    _check_contiguous(k_cache, v_cache)


def _check_contiguous(k_cache: Tensor, v_cache: Tensor) -> None:
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("expected contiguous caches")
