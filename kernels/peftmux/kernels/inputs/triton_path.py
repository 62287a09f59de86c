"""Scaled inputs by Triton: one launch for all adapters of a step."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from peftmux.kernels.inputs import triton_kernels as kernels
from peftmux.kernels.inputs.reference import InputScale
from peftmux.kernels.inputs.site import InputScaleSite, PreparedScale
from peftmux.kernels.lowrank import Segments
from peftmux.kernels.slots import SlotTable


@torch.library.custom_op("peftmux::scale_rows", mutates_args=())
def scale_rows(x: Tensor, slots: Tensor, scales: Tensor) -> Tensor:
    """A copy of x: [rows, D], the rows of tokens whose slot has a scale multiplied by it.

    slots: [T] int32, T <= rows, scales: [S, 1] int64, addresses of float32 [D], 0 for none.
    """
    rows, width = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if rows and width:
        block = scale_tile(width)
        kernels.scale_rows_kernel[(rows, triton.cdiv(width, block))](
            x, out, slots, scales, len(slots), len(scales), x.stride(0), WIDTH=width, BLOCK=block, num_warps=4
        )
    return out


@scale_rows.register_fake
def _(x: Tensor, slots: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def scale_tile(width: int) -> int:
    """Columns of one program."""
    return min(1024, int(triton.next_power_of_2(width)))


class TritonInputScaleSite(InputScaleSite):
    """As its base, and a `GatheredScales`."""

    graphed = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._scales = SlotTable(1, device)

    def prepare(self, part: InputScale) -> PreparedScale:
        scale = part.scale.to(self._device, torch.float32).contiguous()
        return PreparedScale(InputScale(scale), scale.nbytes)

    def put(self, slot: int, prepared: PreparedScale) -> None:
        super().put(slot, prepared)
        self._scales.put(slot, prepared.part.scale)

    def drop(self, slot: int) -> None:
        super().drop(slot)
        self._scales.drop(slot)

    def scaled(self, x: Tensor, segments: Segments) -> Tensor:
        found = self.of_step(segments)
        return x if found is None else scale_rows(x, *found)

    def of_step(self, segments: Segments) -> tuple[Tensor, Tensor] | None:
        return (segments.token_slots, self._scales.tensor) if segments.touches(self._held) else None
