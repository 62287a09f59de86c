"""Replaced weight rows for GPUs: products of a tile's tokens with their adapter's rows, in float32, rounded once."""

from __future__ import annotations

import triton
import triton.language as tl

from peftmux.kernels.lowrank.triton_kernels import products
from peftmux.kernels.slots.triton_kernels import aligned, first_field, vector


@triton.jit
def replaced_rows_kernel(
    y,
    x,
    tiles,
    order,
    table,
    capacity,
    width,
    y_row,
    x_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[t, ids] = values x[t] + bias for the tokens of a tile whose slot has a record in `table`; the rest stays.

    A record is [4] int64: the address of values [n, width] in x's dtype, of ids int64 (0: they are 0 .. n - 1), of the
    bias float32 (0: none), and n. Grid: (tiles, any number of programs that share the rows).
    """
    tile = tiles + tl.program_id(0) * 4
    slot = tl.load(tile)
    values_at = first_field(table, capacity, slot, 4)
    if values_at == 0:
        return
    first, count = tl.load(tile + 1), tl.load(tile + 2)
    record = table + slot.to(tl.int64) * 4
    ids_at, bias_at = tl.load(record + 1), tl.load(record + 2)
    rows = tl.load(record + 3).to(tl.int32)
    m = tl.arange(0, BLOCK_M)
    token = tl.load(order + first + m, mask=m < count, other=0).to(tl.int64)
    for start in range(tl.program_id(1) * BLOCK_N, rows, tl.num_programs(1) * BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        new = products(
            x,
            aligned(values_at, x),
            n.to(tl.int64),
            n < rows,
            token,
            m < count,
            width,
            x_row,
            0,
            PARTS=1,
            BLOCK_M=BLOCK_M,
            BLOCK_R=BLOCK_N,
            BLOCK_K=BLOCK_K,
        )
        if bias_at != 0:
            new += tl.load(vector(bias_at) + n, mask=n < rows, other=0.0)[None, :]
        column = n.to(tl.int64)
        if ids_at != 0:
            column = tl.load(ids_at.to(tl.pointer_type(tl.int64)) + n, mask=n < rows, other=0)
        at = y + token[:, None] * y_row + column[None, :]
        tl.store(at, new.to(y.dtype.element_ty), mask=(m < count)[:, None] & (n < rows)[None, :])
