"""Sparse changes of a weight for GPUs: compressed rows, summed in float32 in one order, rounded once."""

from __future__ import annotations

import triton
import triton.language as tl

from peftmux.kernels.slots.triton_kernels import first_field, vector


@triton.jit
def sparse_kernel(
    y,
    x,
    tiles,
    order,
    table,
    capacity,
    y_row,
    x_row,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """y[t] += D x[t] for the tokens of a tile whose slot has a record in `table`; other rows are not touched.

    A record is [3] int64: the addresses of the row starts [WIDTH + 1] int32, of the columns int32 and of the values
    float32 of D [WIDTH, in]. Grid: (tiles, ceil(WIDTH / BLOCK_N)).
    """
    tile = tiles + tl.program_id(0) * 4
    slot = tl.load(tile)
    starts_at = first_field(table, capacity, slot, 3)
    if starts_at == 0:
        return
    first, count = tl.load(tile + 1), tl.load(tile + 2)
    record = table + slot.to(tl.int64) * 3
    starts = starts_at.to(tl.pointer_type(tl.int32))
    columns = tl.load(record + 1).to(tl.pointer_type(tl.int32))
    values = vector(tl.load(record + 2))
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(starts + n, mask=n < WIDTH, other=0)
    end = tl.load(starts + n + 1, mask=n < WIDTH, other=0)
    longest = tl.max(end - begin, 0)
    for done in range(0, count, BLOCK_M):
        m = done + tl.arange(0, BLOCK_M)
        token = tl.load(order + first + m, mask=m < count, other=0).to(tl.int64)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for passed in range(0, longest, BLOCK_J):
            j = begin[:, None] + passed + tl.arange(0, BLOCK_J)[None, :]
            inside = j < end[:, None]
            column = tl.load(columns + j, mask=inside, other=0)
            value = tl.load(values + j, mask=inside, other=0.0)
            read = (m < count)[:, None, None] & inside[None, :, :]
            given = tl.load(x + token[:, None, None] * x_row + column[None, :, :], mask=read, other=0.0)
            total += tl.sum(given.to(tl.float32) * value[None, :, :], 2)
        at = y + token[:, None] * y_row + n[None, :]
        written = (m < count)[:, None] & (n < WIDTH)[None, :]
        before = tl.load(at, mask=written, other=0.0).to(tl.float32)
        tl.store(at, (before + total).to(y.dtype.element_ty), mask=written)
