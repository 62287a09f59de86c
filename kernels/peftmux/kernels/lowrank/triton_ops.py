"""The two kernels as torch operators, so that torch.compile and FakeTensor see what they write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftmux.kernels.lowrank import triton_kernels
from peftmux.kernels.lowrank.triton_shapes import Shape


def shrink_numbers(shape: Shape, slices: int, aligned: bool) -> list[int]:
    """What `lowrank_shrink` takes as its last argument."""
    own = (shape.block_m, shape.block_r, shape.block_k, shape.block_e, shape.parts, shape.programs)
    return [*own, shape.shrink_warps, shape.shrink_stages, slices, int(aligned)]


def expand_numbers(shape: Shape, slices: int, aligned: bool) -> list[int]:
    """What `lowrank_expand` takes as its last argument."""
    own = (shape.block_m, shape.block_n, shape.reduce_r, shape.expand_warps, shape.expand_stages)
    return [*own, slices, int(aligned)]


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
    block_m, block_r, block_k, block_e, parts, programs, warps, stages, slices, aligned = numbers
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
        SLICES=slices,
        PARTS=parts,
        BLOCK_M=block_m,
        BLOCK_R=block_r,
        BLOCK_K=block_k,
        BLOCK_E=block_e,
        ALIGNED=bool(aligned),
        num_warps=warps,
        num_stages=stages,
    )


@lowrank_shrink.register_fake
def _(
    x: Tensor,
    t: Tensor,
    partial: Tensor,
    arrived: Tensor,
    tiles: Tensor,
    order: Tensor,
    table: Tensor,
    numbers: Sequence[int],
) -> None:
    return None


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
    block_m, block_n, block_r, warps, stages, slices, aligned = numbers
    triton_kernels.expand[(tiles.shape[0], columns.shape[0])](
        t,
        y,
        tiles,
        order,
        table,
        columns,
        table.shape[0],
        t.stride(0),
        y.stride(0),
        SLICES=slices,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_R=block_r,
        ALIGNED=bool(aligned),
        num_warps=warps,
        num_stages=stages,
    )


@lowrank_expand.register_fake
def _(
    t: Tensor,
    y: Tensor,
    tiles: Tensor,
    order: Tensor,
    table: Tensor,
    columns: Tensor,
    numbers: Sequence[int],
) -> None:
    return None
