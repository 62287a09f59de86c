"""Norms with each token's own parameters, for GPUs: in float32, rounded once."""

from __future__ import annotations

import triton
import triton.language as tl

from peftmux.kernels.slots.triton_kernels import aligned, first_field


@triton.jit
def slot_norm_kernel(
    x,
    y,
    like,
    slots,
    table,
    capacity,
    heads,
    x_token,
    x_head,
    y_token,
    y_head,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """y[t, h] = norm(x[t, h]) where token t's slot has a record in `table`; other rows are not written.

    A record is [2] int64: the addresses of weight and bias in `like`'s dtype, the latter 0 for none.
    Grid: (T, ceil(heads / ROWS)).
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    weight_at = first_field(table, capacity, slot, 2)
    if weight_at == 0:
        return
    bias_at = tl.load(table + slot.to(tl.int64) * 2 + 1)
    head = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here = (head < heads)[:, None] & (column < WIDTH)[None, :]
    # In the rows' own layout, so that short rows too read vectors in wide words.
    at = column[None, :] + tl.zeros_like(head)[:, None]
    wide = tl.load(x + token * x_token + head[:, None] * x_head + column[None, :], mask=here, other=0.0).to(tl.float32)
    if CENTRED:
        wide = tl.where(here, wide - (tl.sum(wide, 1) / WIDTH)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)
    out = wide * scale[:, None] * (tl.load(aligned(weight_at, like) + at, mask=here, other=0.0).to(tl.float32) + OFFSET)
    if bias_at != 0:
        out = out + tl.load(aligned(bias_at, like) + at, mask=here, other=0.0).to(tl.float32)
    tl.store(y + token * y_token + head[:, None] * y_head + column[None, :], out.to(y.dtype.element_ty), mask=here)
