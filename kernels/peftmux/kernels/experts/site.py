"""The adapters at one stacked expert weight, and what they add to the outputs of its experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftmux.kernels.experts.pairs import Group
from peftmux.kernels.experts.reference import ExpertsPart
from peftmux.kernels.placed import placed


@dataclass(frozen=True, slots=True, eq=False)
class PreparedExperts:
    """A part on its device in the weight's dtype: owned by the site once put."""

    part: ExpertsPart

    @property
    def nbytes(self) -> int:
        return self.part.a.nbytes + self.part.b.nbytes


class ExpertsSite:
    """`prepare` may run in any thread; everything else belongs to the thread that runs the model."""

    def __init__(self, experts: int, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device):
        self.experts = experts
        self.in_features = in_features
        self.out_features = out_features
        self._dtype = dtype
        self._device = device
        self._held: dict[int, ExpertsPart] = {}

    @property
    def empty(self) -> bool:
        return not self._held

    def __contains__(self, slot: int) -> bool:
        return slot in self._held

    def prepare(self, part: ExpertsPart) -> PreparedExperts:
        """ValueError for wrong shapes, and for values that are not finite in the weight's dtype."""
        expected = (self.experts, part.rank, self.in_features), (self.experts, self.out_features, part.rank)
        if (tuple(part.a.shape), tuple(part.b.shape)) != expected:
            raise ValueError(f"expected a and b of shapes {expected}, got {tuple(part.a.shape)}, {tuple(part.b.shape)}")
        a, b = (placed(t, self._device, self._dtype, "an expert's factors") for t in (part.a, part.b))
        return PreparedExperts(ExpertsPart(a, b, part.scale))

    def put(self, slot: int, prepared: PreparedExperts) -> None:
        self._held[slot] = prepared.part

    def drop(self, slot: int) -> None:
        self._held.pop(slot, None)

    def apply(self, y: Tensor, x: Tensor, groups: Sequence[Group]) -> None:
        """Add, in place, what each pair's adapter does to its expert. y: [P, out], x: [P, in], pairs in groups' order.

        The product with A is rounded to the weight's dtype before the scale, as PEFT's own layers round it.
        """
        for expert, slot, start, end in groups:
            part = self._held.get(slot)
            if part is not None:
                t = (x[start:end] @ part.a[expert].t()).float() * part.scale
                y[start:end].addmm_(t.to(y.dtype), part.b[expert].t())
