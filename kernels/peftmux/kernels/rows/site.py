"""The adapters that replace weight rows at one linear site."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftmux.kernels.lowrank import Segments
from peftmux.kernels.placed import placed
from peftmux.kernels.rows.reference import ReplacedRows, apply_replaced_rows


@dataclass(frozen=True, slots=True, eq=False)
class PreparedRows:
    """A part on its device, in the site's dtype: owned by the site once put."""

    part: ReplacedRows
    nbytes: int


class RowsSite:
    """`prepare` may run in any thread; everything else belongs to the thread that runs the model."""

    graphed = False
    """Whether a captured CUDA graph serves whatever adapters come here later."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._held: dict[int, ReplacedRows] = {}

    @property
    def empty(self) -> bool:
        return not self._held

    def prepare(self, part: ReplacedRows) -> PreparedRows:
        """ValueError for values that are not finite in the site's dtype."""
        values = placed(part.values, self._device, self._dtype, "replaced rows")
        ids = None if part.ids is None else part.ids.to(self._device)
        bias = None if part.bias is None else placed(part.bias, self._device, self._dtype, "the bias of replaced rows")
        size = sum(t.nbytes for t in (values, ids, bias) if t is not None)
        return PreparedRows(ReplacedRows(values, ids, bias), size)

    def put(self, slot: int, prepared: PreparedRows) -> None:
        self._held[slot] = prepared.part

    def drop(self, slot: int) -> None:
        self._held.pop(slot, None)

    def apply(self, y: Tensor, x: Tensor, segments: Segments) -> None:
        """Write, in place, the outputs of tokens whose adapter replaces rows. y: [T, out], x: [T, in]."""
        for slot, start, end in segments.runs:
            part = self._held.get(slot)
            if part is not None:
                y[start:end] = apply_replaced_rows(y[start:end], x[start:end], part)
