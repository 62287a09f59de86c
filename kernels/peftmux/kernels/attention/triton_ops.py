"""Paged attention in Triton as operators that torch.compile and CUDA graphs know."""

from __future__ import annotations

import math

import torch
from torch import Tensor, empty

from peftmux.kernels.attention.triton_kernels import attend_tiles, store_kv
from peftmux.kernels.attention.triton_shapes import shapes_of, store_shape, store_warps


def launch_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    sinks: Tensor | None,
    tiles: Tensor,
    counters: Tensor,
    launches: list[int],
    most: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """The items of `tiles.Tiles`; launches: items, partials and first of each kind.

    q: [T, H, Dk] with neighbouring elements -> [T, H, Dv], contiguous. sinks: [H] float32. counters: int32 zeros, and
    zeros again. most: how many programs a decode launch has at most. window and softcap 0: none.
    """
    out = empty(q.shape[0], q.shape[1], v_cache.shape[3], dtype=q.dtype, device=q.device)
    for shape in shapes_of(q, k_cache, v_cache):
        items, partials, first = launches[3 * shape.kind : 3 * shape.kind + 3]
        if not items:
            continue
        constants = shape.constants
        places = partials * shape.programs * constants["LIVE"]
        sums = empty(places * shape.value_dim, dtype=torch.float32, device=q.device)
        stats = empty(places * 2, dtype=torch.float32, device=q.device)
        attend_tiles[shape.programs_of(items, most)](
            q,
            k_cache,
            v_cache,
            out,
            stats if sinks is None else sinks,
            tiles,
            sums,
            stats,
            counters,
            q.stride(0),
            q.stride(1),
            scale / softcap if softcap else scale * math.log2(math.e),
            softcap * math.log2(math.e),
            window,
            first,
            WINDOW=window > 0,
            SOFTCAP=softcap > 0,
            SINKS=sinks is not None,
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
            maxnreg=shape.max_registers,
            **constants,
        )
    return out


paged_attention = torch.library.custom_op("peftmux::paged_attention", launch_attention, mutates_args=("counters",))
"""`launch_attention` as torch.compile sees it; called directly it costs the host some ten microseconds less."""


@paged_attention.register_fake
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    sinks: Tensor | None,
    tiles: Tensor,
    counters: Tensor,
    launches: list[int],
    most: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v_cache.shape[3])


def launch_store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """k: [T, Hkv, Dk] and v: [T, Hkv, Dv] with neighbouring elements; slots: [T] int64, negative for padding."""
    tokens, heads, key_dim = k.shape
    constants = store_shape(heads, key_dim, v.shape[2])
    if tokens:
        store_kv[(tokens, -(-heads // constants["BLOCK_H"]))](
            k,
            v,
            k_cache,
            v_cache,
            slots,
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            num_warps=store_warps(constants),
            **constants,
        )


write_kv = torch.library.custom_op("peftmux::store_kv", launch_store, mutates_args=("k_cache", "v_cache"))
"""`launch_store`, likewise."""
