"""The kernels as torch operators, so that torch.compile and FakeTensor see what they write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftmux.kernels.lowrank import triton_kernels
from peftmux.kernels.lowrank.triton_shapes import Shape, power_of_two
from peftmux.kernels.lowrank.triton_table import GRANULE


def shrink_numbers(shape: Shape, slices: int, aligned: bool) -> list[int]:
    """What `lowrank_shrink` takes as its last argument."""
    own = (shape.block_m, shape.block_r, shape.block_k, shape.block_e, shape.parts, shape.programs)
    return [*own, shape.shrink_warps, shape.shrink_stages, shape.shrink_registers, slices, int(aligned)]


def expand_numbers(shape: Shape, aligned: bool) -> list[int]:
    """What `lowrank_expand` takes as its last argument."""
    own = (shape.block_m, shape.block_n, shape.reduce_r, shape.expand_warps, shape.expand_stages)
    return [*own, int(aligned)]


@torch.library.custom_op("peftmux::lowrank_shrink", mutates_args=("t", "partial", "arrived"))
def lowrank_shrink(
    x: Tensor,
    t: Tensor,
    partial: Tensor,
    arrived: Tensor,
    tiles: Tensor,
    order: Tensor,
    table: Tensor,
    numbers: Sequence[int],
) -> None:
    """x: [T, K] in rows of neighbouring elements; the rest as in `triton_kernels.shrink`; numbers: `shrink_numbers`."""
    block_m, block_r, block_k, block_e, parts, programs, warps, stages, registers, slices, aligned = numbers
    rows = partial.shape[0] // parts
    triton_kernels.shrink[(tiles.shape[0], programs, parts)](
        x,
        t,
        partial,
        arrived,
        tiles,
        order,
        table,
        table.shape[0],
        x.shape[1],
        x.stride(0),
        t.stride(0),
        partial.stride(0),
        rows * partial.stride(0),
        parts,
        SLICES=slices,
        SPLIT=parts > 1,
        BLOCK_M=block_m,
        BLOCK_R=block_r,
        BLOCK_K=block_k,
        BLOCK_E=block_e,
        ALIGNED=bool(aligned),
        num_warps=warps,
        num_stages=stages,
        maxnreg=registers or None,
    )


@torch.library.custom_op("peftmux::lowrank_expand", mutates_args=("y",))
def lowrank_expand(
    t: Tensor,
    y: Tensor,
    tiles: Tensor,
    order: Tensor,
    table: Tensor,
    columns: Tensor,
    numbers: Sequence[int],
) -> None:
    """y: [T, N] in rows of neighbouring elements; the rest as in `triton_kernels.expand`; numbers: `expand_numbers`."""
    block_m, block_n, block_r, warps, stages, aligned = numbers
    triton_kernels.expand[(tiles.shape[0], columns.shape[0])](
        t,
        y,
        tiles,
        order,
        table,
        columns,
        table.shape[0],
        table.stride(0),
        t.stride(0),
        y.stride(0),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_R=block_r,
        ALIGNED=bool(aligned),
        num_warps=warps,
        num_stages=stages,
    )


@torch.library.custom_op("peftmux::lowrank_outer", mutates_args=("out",))
def lowrank_outer(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    groups: Tensor,
    order: Tensor,
    table: Tensor,
    rank: int,
    aligned: bool,
) -> None:
    """What `triton_kernels.outer` computes, into `out`, in which the table's addresses lie; rank: the largest."""
    block_r = min(max(power_of_two(rank), GRANULE), 32)
    width = right.shape[1]
    block_n = 128 if groups.shape[0] * width >= 128 * 256 else 32
    triton_kernels.outer[(groups.shape[0], -(-width // block_n), -(-rank // block_r))](
        left,
        right,
        groups,
        order,
        table,
        table.shape[0],
        width,
        left.stride(0),
        right.stride(0),
        BLOCK_M=64 if left.element_size() == 2 else 32,
        BLOCK_R=block_r,
        BLOCK_N=block_n,
        ALIGNED=aligned,
        num_warps=4,
        num_stages=3,
    )
