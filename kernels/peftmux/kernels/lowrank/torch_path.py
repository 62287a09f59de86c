"""The gathered operator by torch's own products: on every device, and wherever no native library is.

Two forms. Adapters without an epilogue share one product: their A rows stacked, the result masked to each token's own
ranks, then the stacked B. Its cost is flat in the number of adapters while the stack is small. Adapters with an
epilogue (which must see the sum before it is rounded) or a gate, and stacks that grew too large, go run by run.
In bfloat16 the product with A is rounded before the scale, as PEFT's own layers round it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

from peftmux.kernels.lowrank.layout import Prepared
from peftmux.kernels.lowrank.reference import gated
from peftmux.kernels.lowrank.segments import Segments

_WIDEST_STACK = 256
"""Ranks in one masked product. Above, its zeros cost more than one product per run."""


class TorchPath:
    """One site's adapters. Used by one thread."""

    name = "torch"
    panel = None
    most_experts = None

    def __init__(self, slices: tuple[int, ...]) -> None:
        self._slices = slices
        self._offsets = (0, *accumulate(slices))
        self._held: dict[int, Prepared] = {}
        self._b: dict[int, list[Tensor]] = {}
        self._stack: tuple[tuple[int, ...], Tensor, Tensor, Tensor, Tensor] | None = None

    def put(self, slot: int, prepared: Prepared) -> None:
        self._held[slot] = prepared
        self._b[slot] = _rank_rows(prepared, self._slices)
        self._stack = None

    def drop(self, slot: int) -> None:
        del self._held[slot], self._b[slot]
        self._stack = None

    def apply(self, y: Tensor, x: Tensor, segments: Segments) -> None:
        here = [slot for slot in segments.slots if slot in self._held]
        shared = [slot for slot in here if _stackable(self._held[slot])]
        if sum(sum(self._held[slot].ranks) for slot in shared) > _WIDEST_STACK:
            shared = []
        if shared:
            count = segments.num_tokens
            self._apply_stack(y[:count], x[:count], segments.slot_of_token, tuple(shared))
        for slot, start, end in segments.runs:
            if slot in self._held and slot not in shared:
                self._apply_run(y[start:end], x[start:end], self._held[slot], self._b[slot])

    def _apply_stack(self, y: Tensor, x: Tensor, owner: Tensor, slots: tuple[int, ...]) -> None:
        if self._stack is None or self._stack[0] != slots:
            self._stack = (slots, *_stack(self._held, self._b, slots, self._offsets))
        _, a, b, scale, column_slot = self._stack
        own = owner.unsqueeze(1) == column_slot  # [T, R]
        t = torch.where(own, (x @ a.t()).float() * scale, 0.0)
        y.addmm_(t.to(y.dtype), b)

    def _apply_run(self, y: Tensor, x: Tensor, held: Prepared, rank_rows: list[Tensor]) -> None:
        t = _gated(x, held) if held.gated else (x @ held.a.t()).float() * held.rank_scale
        if held.out_scale is None or held.bias is None:
            for piece, target, b in zip(
                torch.split(t, list(held.ranks), 1), torch.split(y, list(self._slices), 1), rank_rows, strict=True
            ):
                if b.shape[0]:
                    target.addmm_(piece.to(y.dtype), b)
            return
        total = y.float()
        for piece, target, b in zip(
            torch.split(t, list(held.ranks), 1), torch.split(total, list(self._slices), 1), rank_rows, strict=True
        ):
            if b.shape[0]:
                target.addmm_(piece, b.float())
        y.copy_(total * held.out_scale + held.bias)


def _stackable(held: Prepared) -> bool:
    return held.out_scale is None and not held.gated


def _gated(x: Tensor, held: Prepared) -> Tensor:
    """[T, R]: the ranks of slices with experts weighed by their experts' shares, which are made in float32."""
    count = sum(held.ranks)
    ranks = (x @ held.a[:count].t()).float() * held.rank_scale[:count]
    logits = x.float() @ held.a[count:].float().t()
    pieces = zip(ranks.split(list(held.ranks), 1), logits.split(list(held.experts), 1), held.experts, strict=True)
    return torch.cat([gated(piece, by) if experts else piece for piece, by, experts in pieces], 1)


def _rank_rows(held: Prepared, slices: tuple[int, ...]) -> list[Tensor]:
    """Of each slice, [r, N_slice]."""
    areas = torch.split(held.b, [r * n for r, n in zip(held.ranks, slices, strict=True)])
    return [area.view(r, n) for area, r, n in zip(areas, held.ranks, slices, strict=True)]


def _stack(
    held: Mapping[int, Prepared],
    rank_rows: Mapping[int, list[Tensor]],
    slots: tuple[int, ...],
    offsets: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> A [R, K], B [R, N] with zeros outside each rank's slice, scale [R], the slot that owns each rank [R]."""
    a = torch.cat([held[s].a for s in slots])
    b = a.new_zeros(a.shape[0], offsets[-1])
    row = 0
    for slot in slots:
        for piece, start, end in zip(rank_rows[slot], offsets, offsets[1:], strict=False):
            b[row : row + piece.shape[0], start:end] = piece
            row += piece.shape[0]
    scale = torch.cat([held[s].rank_scale for s in slots])
    owner = torch.repeat_interleave(torch.tensor(slots), torch.tensor([held[s].a.shape[0] for s in slots]))
    return a, b, scale, owner.to(a.device)
