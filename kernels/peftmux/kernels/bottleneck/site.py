"""The adapters at one residual branch of the base."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

import torch
from torch import Tensor

from peftmux.kernels.bottleneck.reference import Bottleneck, Fusion, apply_bottleneck, apply_fusion
from peftmux.kernels.lowrank import Segments
from peftmux.kernels.placed import placed
from peftmux.kernels.tree import mapped, tensors


@dataclass(frozen=True, slots=True, eq=False)
class PreparedBranch:
    """A part on its device, in the base's dtype: owned by the site once put."""

    part: Bottleneck | Fusion
    nbytes: int


class BranchSite:
    """`prepare` may run in any thread; everything else belongs to the thread that runs the model."""

    def __init__(self, dtype: torch.dtype, device: torch.device, on_change: Callable[[bool], None]) -> None:
        """on_change: told whether any adapter is here."""
        self._dtype = dtype
        self._device = device
        self._on_change = on_change
        self._held: dict[int, Bottleneck | Fusion] = {}

    @property
    def graphed(self) -> bool:
        """Whether a captured CUDA graph serves what is here and whatever adapters come later."""
        return False

    @property
    def empty(self) -> bool:
        return not self._held

    def prepare(self, part: Bottleneck | Fusion) -> PreparedBranch:
        """ValueError for values that are not finite in the base's dtype."""
        there = mapped(part, lambda tensor: placed(tensor, self._device, self._dtype, "a bottleneck"))
        return PreparedBranch(there, sum(tensor.nbytes for tensor in tensors(there)))

    def put(self, slot: int, prepared: PreparedBranch) -> None:
        self._held[slot] = prepared.part
        self._on_change(True)

    def drop(self, slot: int) -> None:
        self._held.pop(slot, None)
        self._on_change(bool(self._held))

    def apply(self, y: Tensor, h: Tensor, segments: Segments) -> None:
        """Change, in place, what the branch gives tokens whose adapter has a part here. y, h: [T, D]."""
        self.apply_runs(y, h, segments, self._held)

    def apply_runs(self, y: Tensor, h: Tensor, segments: Segments, slots: Container[int]) -> None:
        """`apply` of these slots, run by run by the definition."""
        for slot, start, end in segments.runs:
            part = self._held.get(slot) if slot in slots else None
            if isinstance(part, Bottleneck):
                y[start:end] = apply_bottleneck(y[start:end], h[start:end], part)
            elif part is not None:
                y[start:end] = apply_fusion(y[start:end], h[start:end], part)
