"""Triton kernels of paged attention.

A tile is some neighbouring query tokens of one row with the query heads that share one key/value head: M = tokens *
heads queries, so that each key is read once for all of them. A long context is split over several programs; the one
that finishes last merges their partial sums, in the order of the splits: the result has the same bits every time, and
they depend on nothing but the row itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def store_kv(
    k,
    v,
    k_cache,
    v_cache,
    slots,
    k_token,
    k_head,
    v_token,
    v_head,
    HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Program (t, i): BLOCK_H heads of token t to slots[t]; a negative slot is a padding token's."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot >= 0:
        h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        dk = tl.arange(0, BLOCK_K)[None, :]
        dv = tl.arange(0, BLOCK_V)[None, :]
        key = tl.load(k + token * k_token + h * k_head + dk, mask=(h < HEADS) & (dk < KEY_DIM))
        value = tl.load(v + token * v_token + h * v_head + dv, mask=(h < HEADS) & (dv < VALUE_DIM))
        tl.store(k_cache + (slot * HEADS + h) * KEY_DIM + dk, key, mask=(h < HEADS) & (dk < KEY_DIM))
        tl.store(v_cache + (slot * HEADS + h) * VALUE_DIM + dv, value, mask=(h < HEADS) & (dv < VALUE_DIM))


@triton.jit(do_not_specialize=["window", "first"])
def attend_tiles(
    q,
    k_cache,
    v_cache,
    out,
    sinks,
    tiles,
    partials,
    stats,
    counters,
    q_token,
    q_head,
    scale,
    cap,
    window,
    first,
    KIND: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    LIVE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Program (h, p): the items p, p + P, ... of `tiles` for the h-th HEADS query heads that share a key/value head.

    tiles[KIND] items start at tiles[first], eight numbers each (`tiles.FIELDS`). scale is in units of log2, or, with
    SOFTCAP, of the cap, and cap in units of log2. LIVE of a tile's BLOCK_M queries can be live at most.
    """
    pid = tl.program_id(0)
    chunks: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = pid // chunks
    head0 = kv_head * GROUP + pid % chunks * HEADS
    m = tl.arange(0, BLOCK_M)
    token = m // HEADS
    head = head0 + m % HEADS
    head_live = pid % chunks * HEADS + m % HEADS < GROUP
    n = tl.arange(0, BLOCK_N)
    dk = tl.arange(0, BLOCK_K)
    dv = tl.arange(0, BLOCK_V)
    for index in range(tl.program_id(1), tl.load(tiles + KIND), tl.num_programs(1)):
        item = tiles + first + index * 8
        token0 = tl.load(item).to(tl.int64)
        tokens = tl.load(item + 1)
        at0 = tl.load(item + 2)
        step = tl.load(item + 3)
        pages = tiles + tl.load(item + 4)
        split = tl.load(item + 5)
        splits = tl.load(item + 6)
        partial = tl.load(item + 7).to(tl.int64)

        # Keys low .. high - 1 are seen by some query of the tile; they are shared by `parts` programs.
        high = at0 + step * (tokens - 1) + 1
        low = 0
        if WINDOW:
            low = tl.maximum(at0 - window + 1, 0)
        share = high - low
        parts = 1
        if SPLIT:
            share = tl.maximum(tl.cdiv(tl.cdiv(high - low, splits), BLOCK_N) * BLOCK_N, SPLIT_KEYS)
            parts = tl.maximum(tl.cdiv(high - low, share), 1)
        if split < parts:
            live = (token < tokens) & head_live
            q_at = (token0 + token)[:, None] * q_token + head[:, None] * q_head + dk[None, :]
            queries = tl.load(q + q_at, mask=live[:, None] & (dk < KEY_DIM)[None, :], other=0.0)
            at = at0 + step * token
            top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
            if SINKS:
                # Part 0 alone counts the sink.
                top = tl.load(sinks + head, mask=live & (split == 0), other=-float("inf")) * LOG2E
                total = tl.where(top == -float("inf"), 0.0, 1.0)
            begin = low + split * share
            end = tl.minimum(begin + share, high)
            for start in range(begin, end, BLOCK_N):
                j = start + n
                page = tl.load(pages + j // PAGE, mask=j < end, other=0).to(tl.int64)
                row = (page * PAGE + j % PAGE) * KV_HEADS + kv_head
                key_mask = (j < end)[None, :] & (dk < KEY_DIM)[:, None]
                keys = tl.load(k_cache + row[None, :] * KEY_DIM + dk[:, None], mask=key_mask, other=0.0)
                s = tl.dot(queries, keys, input_precision="ieee") * scale
                if SOFTCAP:
                    s = cap - 2.0 * cap / (tl.exp2(s * (2.0 * LOG2E)) + 1.0)
                seen = (j[None, :] <= at[:, None]) & (j < end)[None, :]
                if WINDOW:
                    seen &= at[:, None] - j[None, :] < window
                s = tl.where(seen, s, -float("inf"))
                higher = tl.maximum(top, tl.max(s, 1))
                # A query that has seen no key yet has no finite maximum to subtract.
                base = tl.where(higher == -float("inf"), 0.0, higher)
                weights = tl.exp2(s - base[:, None])
                kept = tl.exp2(top - base)
                total = total * kept + tl.sum(weights, 1)
                value_mask = (j < end)[:, None] & (dv < VALUE_DIM)[None, :]
                values = tl.load(v_cache + row[:, None] * VALUE_DIM + dv[None, :], mask=value_mask, other=0.0)
                acc = tl.dot(weights.to(values.dtype), values, acc * kept[:, None], input_precision="ieee")
                top = higher

            out_at = ((token0 + token)[:, None] * (KV_HEADS * GROUP) + head[:, None]) * VALUE_DIM + dv[None, :]
            out_mask = live[:, None] & (dv < VALUE_DIM)[None, :]
            if parts == 1:
                acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
                tl.store(out + out_at, acc.to(out.dtype.element_ty), mask=out_mask)
            elif SPLIT:
                group = KV_HEADS * chunks
                place = (partial * group + pid) * LIVE + m
                tl.store(stats + place * 2, top, mask=live)
                tl.store(stats + place * 2 + 1, total, mask=live)
                tl.store(partials + place[:, None] * VALUE_DIM + dv[None, :], acc, mask=out_mask)
                # Every thread's stores come before the one that counts them.
                tl.debug_barrier()
                counter = counters + (partial - split) * group + pid
                if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1:
                    for m0 in tl.range(0, BLOCK_M, 16, num_stages=1):
                        _merge(
                            out, partials, stats, (partial - split) * group + pid, group, parts, token0, tokens,
                            head0, pid % chunks * HEADS, m0, KV_HEADS * GROUP, GROUP, HEADS, LIVE, VALUE_DIM, BLOCK_V,
                        )  # fmt: skip
                    # Zero again for the next launch.
                    tl.atomic_xchg(counter, 0, sem="release", scope="gpu")


@triton.jit
def _merge(
    out,
    partials,
    stats,
    place,
    stride,
    parts,
    token0,
    tokens,
    head0,
    group0,
    m0,
    ALL: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    LIVE: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Queries m0 .. m0 + 15 of a tile: the sums of its parts, at place, place + stride, ..., into `out`."""
    m = m0 + tl.arange(0, 16)
    dv = tl.arange(0, BLOCK_V)
    live = (m // HEADS < tokens) & (group0 + m % HEADS < GROUP)
    mask = live[:, None] & (dv < VALUE_DIM)[None, :]
    top = tl.full((16,), -float("inf"), tl.float32)
    total = tl.zeros((16,), tl.float32)
    acc = tl.zeros((16, BLOCK_V), tl.float32)
    for part in tl.range(0, parts, num_stages=1):
        at = (place + part * stride) * LIVE + m
        its_top = tl.load(stats + at * 2, mask=live, other=0.0, cache_modifier=".cg")
        its_total = tl.load(stats + at * 2 + 1, mask=live, other=0.0, cache_modifier=".cg")
        its_acc = tl.load(partials + at[:, None] * VALUE_DIM + dv[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, its_top)
        base = tl.where(higher == -float("inf"), 0.0, higher)
        old, new = tl.exp2(top - base), tl.exp2(its_top - base)
        total = total * old + its_total * new
        acc = acc * old[:, None] + its_acc * new[:, None]
        top = higher
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_at = ((token0 + m // HEADS) * ALL + head0 + m % HEADS)[:, None] * VALUE_DIM + dv[None, :]
    tl.store(out + out_at, acc.to(out.dtype.element_ty), mask=mask)
