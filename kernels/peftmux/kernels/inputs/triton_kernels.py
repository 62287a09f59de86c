"""Scaled inputs for GPUs."""

from __future__ import annotations

import triton
import triton.language as tl

from peftmux.kernels.slots.triton_kernels import first_field, vector


@triton.jit(do_not_specialize=["tokens"])
def scale_rows_kernel(x, out, slots, scales, tokens, capacity, x_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out [rows, WIDTH] is x; of the first `tokens` rows those whose slot has an address in `scales` are multiplied by
    the float32 vector there. Grid: (rows, ceil(WIDTH / BLOCK)).
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < WIDTH
    value = tl.load(x + row * x_row + column, mask=here, other=0.0)
    slot = tl.load(slots + row, mask=row < tokens, other=0)
    address = first_field(scales, capacity, slot, 1)
    if address != 0:
        scale = tl.load(vector(address) + column, mask=here, other=0.0)
        value = (value.to(tl.float32) * scale).to(out.dtype.element_ty)
    tl.store(out + row * WIDTH + column, value, mask=here)
