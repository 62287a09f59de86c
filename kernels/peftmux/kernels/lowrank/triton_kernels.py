"""The gathered low-rank operator as two launches: shrink makes t = gate * scale * (x A^T), expand adds t B to y.

    t[p, c] = scale_s * share(x, c) * sum_k x[token(p), k] A[row(c), k]
    y[token(p), n] = out_scale[n] * (y[token(p), n] + sum_c t[p, c] B[c, n]) + bias[n]

p is a position of `tiles.Tiles`, c a column of t: every slice's ranks from a multiple of 16 on. A tile of one row is
computed without the matrix unit (a matrix-vector product); wider tiles with it, their first operand an untouched load
(ptxas before 13.3 pipelines wgmma with a computed operand wrongly). Sums over split widths are made by the program that
arrives last, in order: the same bits every time.
"""

import triton
import triton.language as tl

from peftmux.kernels.lowrank import triton_table

HEAD = tl.constexpr(triton_table.HEAD)
FIELDS = tl.constexpr(triton_table.FIELDS)
GRANULE = tl.constexpr(triton_table.GRANULE)


@triton.jit
def _matrix(field, like, ALIGNED: tl.constexpr):
    """The address that a table holds, as a pointer to what `like` points to."""
    matrix = tl.load(field).to(tl.pointer_type(like.dtype.element_ty))
    if ALIGNED:
        matrix = tl.multiple_of(matrix, 16)
    return matrix


@triton.jit
def products(
    x,
    matrix,
    row,
    has_row,
    token,
    has_token,
    width,
    stride_x,
    part,
    PARTS,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr = None,
):
    """[BLOCK_M, BLOCK_R] float32: rows of x by rows of the matrix, over one of PARTS parts of their width.

    STAGES: of the loop's pipeline where it is not the launch's own.
    """
    k = tl.arange(0, BLOCK_K)
    if BLOCK_M == 1:
        sums = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
        rows_a = matrix + row[:, None] * width + k[None, :]
        rows_x = x + tl.sum(token, 0) * stride_x + k
        for start in range(part * BLOCK_K, width, BLOCK_K * PARTS):
            own = start + k < width
            a = tl.load(rows_a + start, mask=has_row[:, None] & own[None, :], other=0.0)
            v = tl.load(rows_x + start, mask=own, other=0.0)
            sums += a.to(tl.float32) * v.to(tl.float32)[None, :]
        out = tl.sum(sums, 1)[None, :]
    else:
        out = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        rows_a = matrix + row[None, :] * width + k[:, None]
        rows_x = x + token[:, None] * stride_x + k[None, :]
        for start in tl.range(part * BLOCK_K, width, BLOCK_K * PARTS, num_stages=STAGES):
            own = start + k < width
            a = tl.load(rows_a + start, mask=has_row[None, :] & own[:, None], other=0.0)
            v = tl.load(rows_x + start, mask=has_token[:, None] & own[None, :], other=0.0)
            out = tl.dot(v, a, out, input_precision="ieee")
    return out


@triton.jit
def _rows(entry, c, SLICES: tl.constexpr):
    """Of the columns c of t: their rows in A, and whether they have one."""
    row = c * 0
    has_row = c < 0
    for i in tl.static_range(SLICES):
        piece = entry + HEAD + i * FIELDS
        start = tl.load(piece + 1).to(tl.int32)
        inside = (c >= start) & (c < start + tl.load(piece).to(tl.int32))
        row = tl.where(inside, tl.load(piece + 2).to(tl.int32) + c - start, row)
        has_row = has_row | inside
    return row, has_row


@triton.jit
def _scales(entry, c, SLICES: tl.constexpr):
    """Of the columns c of t."""
    scale = c.to(tl.float32) * 0.0
    for i in tl.static_range(SLICES):
        piece = entry + HEAD + i * FIELDS
        own = tl.load(piece + 4).to(tl.int32).to(tl.float32, bitcast=True)
        scale = tl.where(c >= tl.load(piece + 1).to(tl.int32), own, scale)
    return scale


@triton.jit
def _first_gate(entry, SLICES: tl.constexpr):
    """The row of A after those of all ranks."""
    row = tl.load(entry + HEAD)
    for i in tl.static_range(1, SLICES):
        row += tl.load(entry + HEAD + i * FIELDS)
    return row.to(tl.int32)


@triton.jit
def _gates(piece, block, BLOCK_R: tl.constexpr):
    """Whether a gate weighs columns of this block."""
    start = tl.load(piece + 1)
    return (tl.load(piece + 5) > 0) & (block * BLOCK_R < start + tl.load(piece)) & (start < (block + 1) * BLOCK_R)


@triton.jit
def _weighed(acc, logits, piece, c, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr):
    """acc [BLOCK_M, BLOCK_R], its columns in this slice times the softmax of logits [BLOCK_M, BLOCK_E]."""
    rank = tl.load(piece).to(tl.int32)
    start = tl.load(piece + 1).to(tl.int32)
    experts = tl.load(piece + 5).to(tl.int32)
    e = tl.arange(0, BLOCK_E)
    logits = tl.where((e < experts)[None, :], logits, float("-inf"))
    shares = tl.exp(logits - tl.max(logits, 1)[:, None])
    shares = shares / tl.sum(shares, 1)[:, None]
    each = rank // experts
    weights = acc * 0.0
    for i in range(experts):
        one = tl.sum(tl.where((e == i)[None, :], shares, 0.0), 1)
        own = (c >= start + i * each) & (c < start + (i + 1) * each)
        weights = tl.where(own[None, :], one[:, None], weights)
    inside = (c >= start) & (c < start + rank)
    return tl.where(inside[None, :], acc * weights, acc)


@triton.jit
def _summed(partial, mask, stride_part, parts):
    """Of all parts in order; past the first-level cache, since other programs have written them."""
    total = tl.load(partial, mask=mask, other=0.0, cache_modifier=".cg")
    for i in range(1, parts):
        total += tl.load(partial + i * stride_part, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def shrink(
    x,
    t,
    partial,
    arrived,
    tiles,
    order,
    table,
    slots,
    width,
    stride_x,
    stride_t,
    stride_partial,
    stride_part,
    parts,
    SLICES: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Grid (tiles, programs that share the columns of t, parts); SPLIT says whether there are several parts.

    x: [T, width]; t: [T, stride_t] by position; partial: [parts, T, stride_partial] float32, the columns of t and after
    them BLOCK_E of each slice for its gate; arrived: [tiles, stride_t / 16] int32, zeros, and left so.
    """
    tile = tl.program_id(0)
    slot = tl.load(tiles + tile * 4)
    if (slot < 0) | (slot >= slots):
        return
    part = tl.program_id(2)
    first = tl.load(tiles + tile * 4 + 1)
    m = tl.arange(0, BLOCK_M)
    has_token = m < tl.load(tiles + tile * 4 + 2)
    token = tl.load(order + first + m, mask=has_token, other=0).to(tl.int64)
    position = (first + m)[:, None]
    entry = table + slot.to(tl.int64) * (HEAD + SLICES * FIELDS)
    a = _matrix(entry + 2, x, ALIGNED)
    columns = tl.load(entry + 3).to(tl.int32)
    for block in range(tl.program_id(1), tl.cdiv(columns, BLOCK_R), tl.num_programs(1)):
        c = block * BLOCK_R + tl.arange(0, BLOCK_R)
        row, has_row = _rows(entry, c, SLICES)
        mask = has_token[:, None] & (c < columns)[None, :]
        acc = products(x, a, row, has_row, token, has_token, width, stride_x, part, parts, BLOCK_M, BLOCK_R, BLOCK_K)
        if BLOCK_E:
            e = tl.arange(0, BLOCK_E)
            gate_row = _first_gate(entry, SLICES)
            for i in tl.static_range(SLICES):
                piece = entry + HEAD + i * FIELDS
                experts = tl.load(piece + 5).to(tl.int32)
                if _gates(piece, block, BLOCK_R):
                    logits = products(
                        x,
                        a,
                        gate_row + e,
                        e < experts,
                        token,
                        has_token,
                        width,
                        stride_x,
                        part,
                        parts,
                        BLOCK_M,
                        BLOCK_E,
                        BLOCK_K,
                        1 if BLOCK_M < 64 else None,  # few columns: registers are worth more than a pipeline
                    )
                    if not SPLIT:
                        acc = _weighed(acc, logits, piece, c, BLOCK_M, BLOCK_R, BLOCK_E)
                    else:  # every block of this slice writes the same bits here
                        own = partial + part * stride_part + position * stride_partial
                        tl.store(own + stride_t + i * BLOCK_E + e[None, :], logits, mask=has_token[:, None])
                gate_row += experts
        if not SPLIT:
            acc = acc * _scales(entry, c, SLICES)[None, :]
            tl.store(t + position * stride_t + c[None, :], acc.to(t.dtype.element_ty), mask=mask)
        else:
            sums = partial + position * stride_partial
            tl.store(sums + part * stride_part + c[None, :], acc, mask=mask)
            tl.debug_barrier()
            counter = arrived + tile * (stride_t // GRANULE) + block
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1:
                total = _summed(sums + c[None, :], mask, stride_part, parts)
                if BLOCK_E:
                    e = tl.arange(0, BLOCK_E)
                    for i in tl.static_range(SLICES):
                        piece = entry + HEAD + i * FIELDS
                        if _gates(piece, block, BLOCK_R):
                            logits = _summed(
                                sums + stride_t + i * BLOCK_E + e[None, :], has_token[:, None], stride_part, parts
                            )
                            total = _weighed(total, logits, piece, c, BLOCK_M, BLOCK_R, BLOCK_E)
                total = total * _scales(entry, c, SLICES)[None, :]
                tl.store(t + position * stride_t + c[None, :], total.to(t.dtype.element_ty), mask=mask)
                tl.atomic_xchg(counter, 0, sem="release", scope="gpu")


@triton.jit
def expand(
    t,
    y,
    tiles,
    order,
    table,
    columns,
    slots,
    stride_table,
    stride_t,
    stride_y,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Grid (tiles, rows of `columns`, see `triton_table.column_table`). t: [T, stride_t] by position; y: [T, N]."""
    tile = tl.program_id(0)
    slot = tl.load(tiles + tile * 4)
    if (slot < 0) | (slot >= slots):
        return
    own = columns + tl.program_id(1) * 4
    width = tl.load(own + 2)
    start = tl.load(own + 3)
    entry = table + slot.to(tl.int64) * stride_table
    piece = entry + HEAD + tl.load(own) * FIELDS
    rank = tl.load(piece).to(tl.int32)
    column = tl.load(piece + 1).to(tl.int32)
    out_scale = tl.load(entry)
    bias = tl.load(entry + 1)
    if (rank == 0) & (out_scale == 0) & (bias == 0):
        return
    b = _matrix(piece + 3, t, ALIGNED)
    if ALIGNED:
        width = tl.multiple_of(width, 16)
        start = tl.multiple_of(start, 16)
    column = tl.multiple_of(column, 16)
    kept = tl.multiple_of(tl.cdiv(rank, GRANULE) * GRANULE, 16)
    n = tl.multiple_of(tl.load(own + 1), BLOCK_N) + tl.arange(0, BLOCK_N)
    has_column = n < width
    m = tl.arange(0, BLOCK_M)
    first = tl.load(tiles + tile * 4 + 1)
    has_token = m < tl.load(tiles + tile * 4 + 2)
    token = tl.load(order + first + m, mask=has_token, other=0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    rows_b = b + r[:, None] * width + n[None, :]
    if BLOCK_M == 1:
        sums = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
        source = t + first * stride_t + column
        for done in range(0, rank, BLOCK_R):
            own_r = done + r
            tile_b = tl.load(
                rows_b + done * width,
                mask=(own_r < rank)[:, None] & has_column[None, :],
                other=0.0,
            )
            tile_t = tl.load(source + own_r, mask=own_r < kept, other=0.0)
            sums += tile_b.to(tl.float32) * tile_t.to(tl.float32)[:, None]
        acc = tl.sum(sums, 0)[None, :]
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        source = t + (first + m)[:, None] * stride_t + column
        for done in range(0, rank, BLOCK_R):
            own_r = done + r
            tile_b = tl.load(
                rows_b + done * width,
                mask=(own_r < rank)[:, None] & has_column[None, :],
                other=0.0,
            )
            tile_t = tl.load(source + own_r[None, :], mask=has_token[:, None] & (own_r < kept)[None, :], other=0.0)
            acc = tl.dot(tile_t, tile_b, acc, input_precision="ieee")
    mask = has_token[:, None] & has_column[None, :]
    target = y + token[:, None] * stride_y + (start + n)[None, :]
    acc += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    if out_scale != 0:
        factor = out_scale.to(tl.pointer_type(tl.float32))
        if ALIGNED:
            factor = tl.multiple_of(factor, 16)
        acc = acc * tl.load(factor + start + n, mask=has_column, other=1.0)[None, :]
    if bias != 0:
        added = bias.to(tl.pointer_type(tl.float32))
        if ALIGNED:
            added = tl.multiple_of(added, 16)
        acc = acc + tl.load(added + start + n, mask=has_column, other=0.0)[None, :]
    tl.store(target, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def outer(
    left,
    right,
    groups,
    order,
    table,
    slots,
    width,
    stride_left,
    stride_right,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """out[c, n] = sum over the positions p of one adapter of left[p, c] right[token(p), n], in float32.

    Grid (groups, columns of `right` by BLOCK_N, programs that share an adapter's ranks). groups: tiles of all positions
    of an adapter each; left: [T, stride_left] by position; right: [T, width]; the table of one slice gives each
    adapter's rank and, in the place of A, where its out [rank, width] is.
    """
    slot = tl.load(groups + tl.program_id(0) * 4)
    if (slot < 0) | (slot >= slots):
        return
    first = tl.load(groups + tl.program_id(0) * 4 + 1)
    count = tl.load(groups + tl.program_id(0) * 4 + 2)
    entry = table + slot.to(tl.int64) * (HEAD + FIELDS)
    rank = tl.load(entry + HEAD).to(tl.int32)
    out = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        out = tl.multiple_of(out, 16)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    kept = tl.multiple_of(tl.cdiv(rank, GRANULE) * GRANULE, 16)
    for block in range(tl.program_id(2), tl.cdiv(rank, BLOCK_R), tl.num_programs(2)):
        c = block * BLOCK_R + tl.arange(0, BLOCK_R)
        acc = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
        for start in range(0, count, BLOCK_M):
            has_token = start + m < count
            token = tl.load(order + first + start + m, mask=has_token, other=0).to(tl.int64)
            own = left + (first + start + m)[None, :] * stride_left + c[:, None]
            a = tl.load(own, mask=has_token[None, :] & (c < kept)[:, None], other=0.0)
            b = tl.load(
                right + token[:, None] * stride_right + n[None, :],
                mask=has_token[:, None] & (n < width)[None, :],
                other=0.0,
            )
            acc = tl.dot(a, b, acc, input_precision="ieee")
        tl.store(out + c[:, None] * width + n[None, :], acc, mask=(c < rank)[:, None] & (n < width)[None, :])
