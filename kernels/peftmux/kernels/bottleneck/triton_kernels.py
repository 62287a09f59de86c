"""Bottlenecks for GPUs in three launches: what each token's adapter reads, down with the activation, up onto y.

A record of the table is [10] int64: the addresses of down [m, D], up [D, m] (in y's dtype), of the float32 vectors
down_bias [m], up_bias [D], scale [D], and of the weight and bias [D] of the norm of what is read (0: none); m, a
multiple of 16; the activation's place in `triton_path.ACTIVATIONS`; and that of what is read in `triton_path.READS`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peftmux.kernels.lowrank.triton_kernels import products
from peftmux.kernels.slots.triton_kernels import aligned, first_field, vector

FIELDS = tl.constexpr(10)


@triton.jit
def _expm1(x):
    """To the last bits also near zero, where exp(x) - 1 cancels."""
    near = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x / 120))))
    return tl.where(tl.abs(x) < 0.1, near, tl.exp(x) - 1)


@triton.jit
def _tanh(x):
    grown = _expm1(-2 * tl.abs(x))
    size = -grown / (grown + 2)
    return tl.where(x < 0, -size, size)


@triton.jit
def _activated(x, code):
    """By their order in `triton_path.ACTIVATIONS`; one that is not there leaves x as it is."""
    out = x
    if code == 0:
        out = tl.where(x > 0, x, _expm1(x))
    elif code == 1:
        out = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif code == 2:
        out = 0.5 * x * (1 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif code == 3:
        out = tl.where(x > 0, x, 0.01 * x)
    elif code == 5:
        out = tl.maximum(x, 0.0)
    elif code == 6:
        out = tl.minimum(tl.maximum(x, 0.0), 6.0)
    elif code == 7:
        out = tl.sigmoid(x)
    elif code == 8:
        out = x * tl.sigmoid(x)
    elif code == 9:
        out = _tanh(x)
    return out


@triton.jit
def read_kernel(y, h, z, slots, table, capacity, y_row, h_row, epsilon, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """z [T, WIDTH]: of tokens whose slot has a record what it reads, normed where it norms. Grid: (T)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if first_field(table, capacity, slot, FIELDS) == 0:
        return
    record = table + slot.to(tl.int64) * FIELDS
    weight_at, reads = tl.load(record + 5), tl.load(record + 9)
    column = tl.arange(0, BLOCK)
    here = column < WIDTH
    branch = tl.load(y + token * y_row + column, mask=here & (reads != 2), other=0.0).to(tl.float32)
    stream = tl.load(h + token * h_row + column, mask=here & (reads != 0), other=0.0).to(tl.float32)
    wide = (branch + stream).to(z.dtype.element_ty).to(tl.float32)
    if weight_at != 0:
        wide = tl.where(here, wide - tl.sum(wide, 0) / WIDTH, 0.0)
        wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + epsilon)
        weight = tl.load(vector(weight_at) + column, mask=here, other=0.0)
        wide = wide * weight + tl.load(vector(tl.load(record + 6)) + column, mask=here, other=0.0)
    tl.store(z + token * WIDTH + column, wide.to(z.dtype.element_ty), mask=here)


@triton.jit
def down_kernel(
    z,
    t,
    tiles,
    order,
    table,
    capacity,
    width,
    t_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """t[token, :m] = act(down z[token] + down_bias). Grid: (tiles, any number of programs that share m)."""
    tile = tiles + tl.program_id(0) * 4
    slot = tl.load(tile)
    down_at = first_field(table, capacity, slot, FIELDS)
    if down_at == 0:
        return
    first, count = tl.load(tile + 1), tl.load(tile + 2)
    record = table + slot.to(tl.int64) * FIELDS
    bias = vector(tl.load(record + 2))
    inner, code = tl.load(record + 7).to(tl.int32), tl.load(record + 8)
    m = tl.arange(0, BLOCK_M)
    token = tl.load(order + first + m, mask=m < count, other=0).to(tl.int64)
    for start in range(tl.program_id(1) * BLOCK_N, inner, tl.num_programs(1) * BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        sums = products(
            z,
            aligned(down_at, z),
            n.to(tl.int64),
            n < inner,
            token,
            m < count,
            width,
            width,
            0,
            PARTS=1,
            BLOCK_M=BLOCK_M,
            BLOCK_R=BLOCK_N,
            BLOCK_K=BLOCK_K,
        )
        out = _activated(sums + tl.load(bias + n, mask=n < inner, other=0.0)[None, :], code)
        at = t + token[:, None] * t_row + n[None, :]
        tl.store(at, out.to(t.dtype.element_ty), mask=(m < count)[:, None] & (n < inner)[None, :])


@triton.jit
def up_kernel(
    t,
    y,
    tiles,
    order,
    table,
    capacity,
    width,
    t_row,
    y_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[token] += scale * (up t[token] + up_bias). Grid: (tiles, ceil(width / BLOCK_N))."""
    tile = tiles + tl.program_id(0) * 4
    slot = tl.load(tile)
    if first_field(table, capacity, slot, FIELDS) == 0:
        return
    first, count = tl.load(tile + 1), tl.load(tile + 2)
    record = table + slot.to(tl.int64) * FIELDS
    up_at, bias_at, scale_at = tl.load(record + 1), tl.load(record + 3), tl.load(record + 4)
    inner = tl.multiple_of(tl.load(record + 7).to(tl.int32), 16)
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.load(order + first + m, mask=m < count, other=0).to(tl.int64)
    sums = products(
        t,
        aligned(up_at, t),
        n.to(tl.int64),
        n < width,
        token,
        m < count,
        inner,
        t_row,
        0,
        PARTS=1,
        BLOCK_M=BLOCK_M,
        BLOCK_R=BLOCK_N,
        BLOCK_K=BLOCK_K,
    )
    bias = tl.load(vector(bias_at) + n, mask=n < width, other=0.0)
    scale = tl.load(vector(scale_at) + n, mask=n < width, other=0.0)
    at = y + token[:, None] * y_row + n[None, :]
    here = (m < count)[:, None] & (n < width)[None, :]
    before = tl.load(at, mask=here, other=0.0).to(tl.float32)
    tl.store(at, (before + scale[None, :] * (sums + bias[None, :])).to(y.dtype.element_ty), mask=here)
