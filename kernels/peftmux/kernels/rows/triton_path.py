"""Replaced weight rows by Triton: one launch for all adapters of a step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from peftmux.kernels.lowrank import Segments
from peftmux.kernels.rows import triton_kernels as kernels
from peftmux.kernels.rows.reference import ReplacedRows
from peftmux.kernels.rows.site import PreparedRows, RowsSite
from peftmux.kernels.slots import SlotTable

_PROGRAMS = 1024
"""Of a launch, about: few tokens spread an output projection's rows over the device."""


@torch.library.custom_op("peftmux::replace_rows_", mutates_args={"y"})
def replace_rows_(y: Tensor, x: Tensor, tiles: Tensor, order: Tensor, table: Tensor, block_m: int) -> None:
    """y[t, ids] = values x[t] + bias for the tokens whose slot has a record (see `triton_kernels`).

    y: [T, out], x: [T, in], tiles and order as in `lowrank.tiles.Tiles`, table: [S, 4] int64.
    """
    if y.stride(1) != 1 or x.stride(1) != 1 or len(x) != len(y):
        raise ValueError(f"expected rows of neighbouring elements, got strides {y.stride()} and {x.stride()}")
    shape = rows_shape(block_m, x.shape[1], x.element_size())
    blocks = triton.cdiv(y.shape[1], shape.block_n)
    kernels.replaced_rows_kernel[(len(tiles), min(blocks, max(16, _PROGRAMS // len(tiles))))](
        y,
        x,
        tiles,
        order,
        table,
        len(table),
        x.shape[1],
        y.stride(0),
        x.stride(0),
        BLOCK_M=block_m,
        BLOCK_N=shape.block_n,
        BLOCK_K=shape.block_k,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )


@dataclass(frozen=True, slots=True)
class RowsShape:
    """Of one program."""

    block_n: int
    block_k: int
    warps: int
    stages: int


def rows_shape(block_m: int, width: int, itemsize: int) -> RowsShape:
    """For tiles of block_m tokens of so many inputs."""
    block_n, block_k, stages = (16, 256, 3) if block_m == 1 else (64, 64, 3) if itemsize == 2 else (32, 32, 2)
    warps = 8 if block_m >= 64 else 4
    return RowsShape(block_n, max(16, min(block_k, int(triton.next_power_of_2(width)))), warps, stages)


class TritonRowsSite(RowsSite):
    """As its base."""

    graphed = True

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self._table = SlotTable(4, device)

    def prepare(self, part: ReplacedRows) -> PreparedRows:
        """The bias is rounded as the values are, and held in float32."""
        prepared = super().prepare(part)
        bias = prepared.part.bias
        if bias is None:
            return prepared
        wide = bias.float()
        return PreparedRows(replace(prepared.part, bias=wide), prepared.nbytes - bias.nbytes + wide.nbytes)

    def put(self, slot: int, prepared: PreparedRows) -> None:
        super().put(slot, prepared)
        values, ids, bias = prepared.part.values, prepared.part.ids, prepared.part.bias
        self._table.put(slot, values, 0 if ids is None else ids, 0 if bias is None else bias, len(values))

    def drop(self, slot: int) -> None:
        super().drop(slot)
        self._table.drop(slot)

    def apply(self, y: Tensor, x: Tensor, segments: Segments) -> None:
        if segments.touches(self._held):
            tiles = segments.tiles
            replace_rows_(y, x, tiles.tiles, tiles.order, self._table.tensor, tiles.block_m)
