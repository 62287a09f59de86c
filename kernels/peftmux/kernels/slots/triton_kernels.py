"""How kernels read the records of `table.SlotTable`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def first_field(table, capacity, slot, FIELDS: tl.constexpr):
    """Of the slot's record; 0 for slots that have none here, the base model's, padding's and those past the table."""
    return tl.load(table + slot.to(tl.int64) * FIELDS, mask=(slot > 0) & (slot < capacity), other=0)


@triton.jit
def aligned(address, like):
    """An address that a record holds, as a pointer to what `like` points to."""
    return tl.multiple_of(address.to(tl.pointer_type(like.dtype.element_ty)), 16)


@triton.jit
def vector(address):
    """An address that a record holds, as a pointer to float32 values."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)
