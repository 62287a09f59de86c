"""The low-rank term of many adapters over one batch, with gradients, in Triton: for training on a GPU.

    y'[i] = y[i] + s B A x[i],   s, A, B of the adapter of token i

Its gradients have the shape of the operator itself. With B's rank rows in A's place, dt = s dy B is a shrink and
dx = dt A an expand; dA = dt^T x and dB = dy^T t sum over the adapter's tokens. t and dt are rounded to x's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftmux.kernels.lowrank import triton_ops
from peftmux.kernels.lowrank.reference import LinearPart
from peftmux.kernels.lowrank.segments import Segments
from peftmux.kernels.lowrank.tiles import FIELDS as TILE_FIELDS
from peftmux.kernels.lowrank.tiles import Tiles, lay_out
from peftmux.kernels.lowrank.triton_shapes import choose
from peftmux.kernels.lowrank.triton_table import FIELDS, GRANULE, HEAD, bits, column_table, padded
from peftmux.kernels.lowrank.workspace import workspace


def add_lowrank(y: Tensor, x: Tensor, parts: Mapping[int, LinearPart], segments: Segments) -> Tensor:
    """y: [T, N], x: [T, K], parts: a, b and scale by slot -> [T, N] in y's dtype; differentiable in y, x, a and b.

    Tokens whose slot has no part keep their y. ValueError for parts with other pieces than these, or of other widths.
    """
    slots = tuple(slot for slot, part in parts.items() if part.rank)
    factors: list[Tensor] = []
    for slot in slots:
        a, b = _factors(parts[slot], x.shape[1], y.shape[1])
        factors += (a, b)
    if not slots or not segments.runs:
        return y
    scales = tuple(parts[slot].scale for slot in slots)
    out: Tensor = _AddLowRank.apply(y, x.to(y.dtype), segments, slots, scales, *factors)  # type: ignore[no-untyped-call]
    return out


def _factors(part: LinearPart, width: int, out: int) -> tuple[Tensor, Tensor]:
    if part.out_scale is not None or part.bias is not None or part.gate is not None or part.a is None or part.b is None:
        raise ValueError("expected a part of a, b and scale alone")
    shapes = (tuple(part.a.shape), tuple(part.b.shape))
    if shapes != ((part.rank, width), (out, part.rank)):
        raise ValueError(f"expected a [r, {width}] and b [{out}, r], got {shapes[0]} and {shapes[1]}")
    return part.a, part.b


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rank rows of each adapter, [r, width] each, in the batch's dtype."""

    held: tuple[Tensor, ...]
    width: int


@dataclass(frozen=True, slots=True)
class _Batch:
    """What one direction of the operator needs to know of the step and its adapters."""

    tiles: Tiles
    slots: tuple[int, ...]
    scales: tuple[float, ...]
    ranks: tuple[int, ...]

    @property
    def columns(self) -> int:
        return max(map(padded, self.ranks))


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        segments: Segments,
        slots: tuple[int, ...],
        scales: tuple[float, ...],
        *factors: Tensor,
    ) -> Tensor:
        rows_a = [a.detach().to(x.dtype).contiguous() for a in factors[::2]]
        rows_b = [b.detach().to(x.dtype).t().contiguous() for b in factors[1::2]]
        batch = _Batch(segments.tiles, slots, scales, tuple(len(a) for a in rows_a))
        x = x.contiguous()
        out = y.clone(memory_format=torch.contiguous_format)
        t = _apply(out, x, _Rows(tuple(rows_a), x.shape[1]), _Rows(tuple(rows_b), y.shape[1]), batch)
        ctx.save_for_backward(x, t, *rows_a, *rows_b)
        ctx.batch, ctx.groups = batch, _groups(segments)
        ctx.dtypes = [f.dtype for f in factors]
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, t, *rows = ctx.saved_tensors
        batch: _Batch = ctx.batch
        count = len(batch.slots)
        rows_a, rows_b = _Rows(tuple(rows[:count]), x.shape[1]), _Rows(tuple(rows[count:]), dy.shape[1])
        own = dy.contiguous()
        dx = torch.zeros_like(x)
        dt = _apply(dx, own, rows_b, rows_a, batch)
        wanted = ctx.needs_input_grad[5:]
        da = _outer(dt, x, ctx.groups, batch) if any(wanted[::2]) else [None] * count
        db = _outer(t, own, ctx.groups, batch) if any(wanted[1::2]) else [None] * count
        pairs = [grad for a, b in zip(da, db, strict=True) for grad in (a, None if b is None else b.t())]
        grads = [None if g is None else g.to(kind) for g, kind in zip(pairs, ctx.dtypes, strict=True)]
        return dy, dx, None, None, None, *grads


def _apply(y: Tensor, x: Tensor, first: _Rows, second: _Rows, batch: _Batch) -> Tensor:
    """y += s (x first^T) second, in place -> t = s x first^T by position [T, columns]."""
    tiles, columns = batch.tiles, batch.columns
    tokens, count = tiles.order.shape[0], tiles.tiles.shape[0]
    table = _table(batch, [r.data_ptr() for r in first.held], [r.data_ptr() for r in second.held], x.device)
    shape = choose(tiles.block_m, tokens, first.width, columns, max(batch.ranks), x.element_size())
    space = workspace(x.device)
    space.reserve(columns, 1)
    held = space.buffers(tokens, count, x.dtype)
    t = x.new_empty(tokens, columns)
    aligned = first.width % GRANULE == 0 and second.width % GRANULE == 0
    shared = (tiles.tiles, tiles.order, table)
    triton_ops.lowrank_shrink(x, t, held.partial, held.arrived, *shared, triton_ops.shrink_numbers(shape, 1, aligned))
    targets = column_table((second.width,), shape.block_n, x.device)
    triton_ops.lowrank_expand(t, y, *shared, targets, triton_ops.expand_numbers(shape, aligned))
    return t


def _outer(left: Tensor, right: Tensor, groups: Tensor, batch: _Batch) -> list[Tensor]:
    """[rank, width] float32 of each adapter: left^T right over its tokens; zeros where it has none."""
    width = right.shape[1]
    out = torch.zeros(sum(batch.ranks) * width, device=right.device)
    areas = [area.view(-1, width) for area in out.split([rank * width for rank in batch.ranks])]
    addresses = [area.data_ptr() for area in areas]
    table = _table(batch, addresses, addresses, right.device)
    aligned = width % GRANULE == 0
    triton_ops.lowrank_outer(left, right, out, groups, batch.tiles.order, table, max(batch.ranks), aligned)
    return areas


def _groups(segments: Segments) -> Tensor:
    """All positions of an adapter as one tile, [adapters, 4] int32."""
    tiles = np.empty((len(segments.slots), TILE_FIELDS), np.int32)
    lay_out(segments.runs, segments.num_tokens, tiles, np.empty(segments.num_tokens, np.int32))
    return _moved(torch.from_numpy(tiles), segments.device)


def _table(batch: _Batch, a: Sequence[int], b: Sequence[int], device: torch.device) -> Tensor:
    """As `triton_table.record` lays them out, for one slice."""
    rows = torch.zeros(max(batch.slots) + 1, HEAD + FIELDS, dtype=torch.int64)
    for slot, scale, rank, a_at, b_at in zip(batch.slots, batch.scales, batch.ranks, a, b, strict=True):
        rows[slot] = torch.tensor([0, 0, a_at, padded(rank), rank, 0, 0, b_at, bits(scale), 0])
    return _moved(rows, device)


def _moved(host: Tensor, device: torch.device) -> Tensor:
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
