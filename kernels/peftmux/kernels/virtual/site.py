"""The adapters with virtual tokens among real ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftmux.kernels.placed import placed
from peftmux.kernels.virtual.reference import VirtualRows, virtual_embeddings


@dataclass(frozen=True, slots=True, eq=False)
class PreparedVirtual:
    """A table on its device, in the base's dtype: owned by the site once put."""

    part: VirtualRows
    nbytes: int


class VirtualSite:
    """`prepare` may run in any thread; everything else belongs to the thread that runs the model."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        self._dtype = dtype
        self._held: dict[int, VirtualRows] = {}

    def __contains__(self, slot: int) -> bool:
        return slot in self._held

    @property
    def empty(self) -> bool:
        return not self._held

    def prepare(self, part: VirtualRows) -> PreparedVirtual:
        """ValueError for values that the dtype cannot hold."""
        values = placed(part.values, self.device, self._dtype, "virtual tokens")
        return PreparedVirtual(VirtualRows(values), values.nbytes)

    def put(self, slot: int, prepared: PreparedVirtual) -> None:
        self._held[slot] = prepared.part

    def drop(self, slot: int) -> None:
        self._held.pop(slot, None)

    def lookup(self, slot: int, ids: Tensor) -> Tensor:
        """[n, D] of this slot's adapter's virtual tokens. ids: [n] int64 below zero, on the site's device."""
        return virtual_embeddings(ids, self._held[slot])
