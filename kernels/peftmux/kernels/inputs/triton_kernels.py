"""Scaled inputs for GPUs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def scale_rows_kernel(x, out, slots, scales, tokens, x_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out [rows, WIDTH] is x; of the first `tokens` rows those whose slot has an address in `scales` are multiplied by
    the float32 vector there. Grid: (rows, ceil(WIDTH / BLOCK)).
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < WIDTH
    value = tl.load(x + row * x_row + column, mask=here, other=0.0)
    slot = tl.load(slots + row, mask=row < tokens, other=0)
    if slot > 0:
        address = tl.load(scales + slot.to(tl.int64))
        if address != 0:
            vector = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)
            scale = tl.load(vector + column, mask=here, other=0.0)
            value = (value.to(tl.float32) * scale).to(out.dtype.element_ty)
    tl.store(out + row * WIDTH + column, value, mask=here)
