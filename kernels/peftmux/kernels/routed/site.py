"""The adapters of this kind at one linear site, or at several that write neighbouring slices of one output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from peftmux.kernels.lowrank import Segments
from peftmux.kernels.placed import placed
from peftmux.kernels.routed.reference import RoutedPart

Shares = Mapping[int, Tensor]
"""Of each adapter slot in the step: [tokens of the slot in batch order, sites, E] float32."""


@dataclass(frozen=True, slots=True, eq=False)
class PreparedRouted:
    """A part on its device in the site's dtype: owned by the site once put."""

    part: RoutedPart
    counts: Tensor
    """[E] int64, the ranks."""

    @property
    def nbytes(self) -> int:
        return self.part.a.nbytes + self.part.b.nbytes + self.counts.nbytes


class RoutedSite:
    """`slice(i)` is the site of the i-th layer. `prepare` may run in any thread, everything else belongs to the thread
    that runs the model.
    """

    def __init__(self, in_features: int, slices: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.in_features = in_features
        self.dtype = dtype
        self.device = device
        self._columns = list(pairwise((0, *accumulate(slices))))
        self._held: dict[int, dict[int, PreparedRouted]] = {}

    @property
    def empty(self) -> bool:
        return not self._held

    def slice(self, index: int) -> RoutedSlice:
        return RoutedSlice(self, index)

    def width(self, index: int) -> int:
        start, end = self._columns[index]
        return end - start

    def put(self, slot: int, index: int, prepared: PreparedRouted) -> None:
        self._held.setdefault(slot, {})[index] = prepared

    def drop(self, slot: int) -> None:
        self._held.pop(slot, None)

    def apply(self, y: Tensor, x: Tensor, segments: Segments, shares: Shares) -> None:
        """Add, in place, what each token's experts do. y: [T, N], x: [T, K]."""
        done = dict.fromkeys(self._held, 0)
        for slot, start, end in segments.runs:
            if slot in self._held:
                own = shares[slot][done[slot] : done[slot] + end - start]
                done[slot] += end - start
                for index, held in self._held[slot].items():
                    self._apply_run(y[start:end, slice(*self._columns[index])], x[start:end], own, held)

    def _apply_run(self, y: Tensor, x: Tensor, shares: Tensor, held: PreparedRouted) -> None:
        part = held.part
        weights = shares[:, part.layer].repeat_interleave(held.counts, 1, output_size=len(part.a))
        t = (x @ part.a.t()).float() * weights
        y.addmm_(t.to(y.dtype), part.b.t())


class RoutedSlice:
    """One layer's place in a RoutedSite."""

    def __init__(self, whole: RoutedSite, index: int) -> None:
        self._whole = whole
        self._index = index

    def prepare(self, part: RoutedPart) -> PreparedRouted:
        """ValueError for wrong shapes, and for values that are not finite in the site's dtype."""
        total, whole = sum(part.ranks), self._whole
        expected = ((total, whole.in_features), (whole.width(self._index), total))
        if (tuple(part.a.shape), tuple(part.b.shape)) != expected:
            raise ValueError(f"expected a and b of shapes {expected}, got {tuple(part.a.shape)}, {tuple(part.b.shape)}")
        a, b = (placed(t, whole.device, whole.dtype, "an expert's factors") for t in (part.a, part.b))
        counts = torch.tensor(part.ranks, device=whole.device)
        return PreparedRouted(RoutedPart(a, b, part.ranks, part.layer), counts)

    def put(self, slot: int, prepared: PreparedRouted) -> None:
        self._whole.put(slot, self._index, prepared)

    def drop(self, slot: int) -> None:
        self._whole.drop(slot)
