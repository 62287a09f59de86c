"""What is written into the paged cache. k_cache: [NB, BS, Hkv, Dk], v_cache: [NB, BS, Hkv, Dv], both contiguous."""

from __future__ import annotations

from torch import Tensor


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
