"""Row-wise operators for GPUs. Everything is computed in float32 and rounded once, as in `reference`."""

from __future__ import annotations

import triton
import triton.language as tl

from peftmux.kernels.slots.triton_kernels import first_field, vector


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x,
    weight,
    out,
    rows,
    heads,
    x_token,
    x_head,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [rows, WIDTH]; row r of x starts at (r // heads) * x_token + (r % heads) * x_head.

    Grid: (ceil(rows / ROWS)).
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    here = (row < rows)[:, None] & (column < WIDTH)[None, :]
    start = (row // heads) * x_token + (row % heads) * x_head
    wide = tl.load(x + start[:, None] + column[None, :], mask=here, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)
    # In the rows' own layout, so that short rows too read it in wide words.
    gain = tl.load(weight + column[None, :] + tl.zeros_like(row)[:, None], mask=here, other=0.0).to(tl.float32)
    normed = wide * scale[:, None] * gain
    tl.store(out + row[:, None] * WIDTH + column[None, :], normed.to(out.dtype.element_ty), mask=here)


@triton.jit
def add_rms_norm_kernel(
    x,
    stream,
    weight,
    total,
    out,
    x_row,
    stream_row,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """total = stream + x, rounded; out = its norm. total, out [rows, WIDTH]. Grid: (rows)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here = column < WIDTH
    added = tl.load(x + row * x_row + column, mask=here, other=0.0).to(tl.float32)
    before = tl.load(stream + row * stream_row + column, mask=here, other=0.0).to(tl.float32)
    rounded = (before + added).to(total.dtype.element_ty)
    tl.store(total + row * WIDTH + column, rounded, mask=here)
    wide = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    gain = tl.load(weight + column, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, (wide * scale * gain).to(out.dtype.element_ty), mask=here)


@triton.jit
def _turn(x, start, head_stride, head, heads, c1, s1, c2, s2, column, HALF: tl.constexpr):
    at = x + start + head.to(tl.int64)[:, None] * head_stride + column[None, :]
    here = (head < heads)[:, None] & (column < HALF)[None, :]
    first = tl.load(at, mask=here, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=here, other=0.0).to(tl.float32)
    tl.store(at, (first * c1[None, :] - second * s1[None, :]).to(x.dtype.element_ty), mask=here)
    tl.store(at + HALF, (second * c2[None, :] + first * s2[None, :]).to(x.dtype.element_ty), mask=here)


@triton.jit
def rotate_pair_kernel(
    q,
    k,
    cos,
    sin,
    q_token,
    q_head,
    k_token,
    k_head,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turns q and k in place; cos and sin [T, 2 HALF]. Grid: (T, ceil(Q_HEADS / HEADS) + ceil(K_HEADS / HEADS))."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    half = column < HALF
    angle = token * 2 * HALF + column
    c1 = tl.load(cos + angle, mask=half, other=0.0).to(tl.float32)
    s1 = tl.load(sin + angle, mask=half, other=0.0).to(tl.float32)
    c2 = tl.load(cos + angle + HALF, mask=half, other=0.0).to(tl.float32)
    s2 = tl.load(sin + angle + HALF, mask=half, other=0.0).to(tl.float32)
    Q_BLOCKS: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    if block < Q_BLOCKS:
        head = block * HEADS + tl.arange(0, HEADS)
        _turn(q, token * q_token, q_head, head, Q_HEADS, c1, s1, c2, s2, column, HALF)
    else:
        head = (block - Q_BLOCKS) * HEADS + tl.arange(0, HEADS)
        _turn(k, token * k_token, k_head, head, K_HEADS, c1, s1, c2, s2, column, HALF)


@triton.jit(do_not_specialize=["tokens"])
def swiglu_kernel(
    gate_up,
    out,
    slots,
    scales,
    tokens,
    capacity,
    row_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
):
    """out [rows, WIDTH]. Where SCALED, the first `tokens` rows have slots: those whose slot has an address in `scales`
    are multiplied by the float32 vector there. Grid: (rows, ceil(WIDTH / BLOCK)).
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < WIDTH
    gate = tl.load(gate_up + row * row_stride + column, mask=here, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + WIDTH + column, mask=here, other=0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    if SCALED:
        slot = tl.load(slots + row, mask=row < tokens, other=0)
        address = first_field(scales, capacity, slot, 1)
        if address != 0:
            product = product * tl.load(vector(address) + column, mask=here, other=0.0)
    tl.store(out + row * WIDTH + column, product.to(out.dtype.element_ty), mask=here)
