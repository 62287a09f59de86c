"""Adapters of the input embedding for GPUs: in float32, rounded once."""

from __future__ import annotations

import triton
import triton.language as tl

from peftmux.kernels.slots.triton_kernels import aligned, first_field, vector


@triton.jit
def embedding_kernel(
    y,
    ids,
    slots,
    table,
    capacity,
    y_row,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
    IDS: tl.constexpr,
):
    """Changes the rows of y whose token's slot has a record in `table` ([S, 8], see `triton_path.record`).

    Other rows are neither read nor written. Grid: (T, ceil(WIDTH / BLOCK)).
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if first_field(table, capacity, slot, 8) == 0:
        return
    record = table + slot.to(tl.int64) * 8
    a_at, b_at, scale_at = tl.load(record + 1), tl.load(record + 2), tl.load(record + 3)
    ids_at, rows_at = tl.load(record + 4), tl.load(record + 5)
    rank, count = tl.load(record + 6).to(tl.int32), tl.load(record + 7).to(tl.int32)
    known = tl.load(ids + token)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < WIDTH
    value = tl.load(y + token * y_row + column, mask=here, other=0.0).to(tl.float32)

    a, b = vector(a_at) + known * rank, vector(b_at)
    added = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, rank, RANKS):
        r = first + tl.arange(0, RANKS)
        t = tl.load(a + r, mask=r < rank, other=0.0)
        mine = (r < rank)[:, None] & here[None, :]
        rows = tl.load(b + r.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=mine, other=0.0)
        added += tl.sum(t[:, None] * rows, 0)
    value += added
    if scale_at != 0:
        value = value * tl.load(vector(scale_at) + column, mask=here, other=0.0)

    # count < 0: every row is replaced, so a token's row is its id.
    row = tl.where(count < 0, known, -1)
    changed = aligned(ids_at, ids)
    for first in range(0, count, IDS):
        i = first + tl.arange(0, IDS)
        same = tl.load(changed + i, mask=i < count, other=-1) == known
        row = tl.maximum(row, tl.max(tl.where(same, i, -1), 0).to(tl.int64))
    if row >= 0:
        value = tl.load(vector(rows_at) + row * WIDTH + column, mask=here, other=0.0)
    tl.store(y + token * y_row + column, value.to(y.dtype.element_ty), mask=here)
