"""The gathered operator in Triton: two launches a site, whatever adapters, ranks and kinds a step mixes."""

from __future__ import annotations

import torch
from torch import Tensor

from peftmux.kernels.lowrank import triton_ops
from peftmux.kernels.lowrank.layout import Prepared
from peftmux.kernels.lowrank.segments import Segments
from peftmux.kernels.lowrank.tiles import Tiles
from peftmux.kernels.lowrank.triton_shapes import Shape, choose
from peftmux.kernels.lowrank.triton_table import GRANULE, MOST_EXPERTS, SlotTable, column_table, columns_of
from peftmux.kernels.lowrank.workspace import workspace

_FIRST_SLOTS = 256
"""Rows of the table to begin with; it grows, and moves then, with the largest slot that is used."""


class TritonPath:
    """One site's adapters as a table of addresses. The tensors behind them live in `_kept` until dropped.

    Used by the thread that runs the model, on its current stream.
    """

    name = "triton"
    panel = None
    most_experts = MOST_EXPERTS

    def __init__(
        self, in_features: int, slices: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self._width = in_features
        self._slices = slices
        self._itemsize = dtype.itemsize
        self._workspace = workspace(device)
        self._workspace.reserve(GRANULE, len(slices))
        self._table = SlotTable(slices, _FIRST_SLOTS, device)
        self._aligned = all(n % GRANULE == 0 for n in (in_features, *slices))
        self._columns: dict[int, Tensor] = {}
        self._kept: dict[int, Prepared] = {}
        self._most = (0, 0)
        """Columns of t and rank of a slice, of the widest adapter here."""

    def put(self, slot: int, prepared: Prepared) -> None:
        self._kept[slot] = prepared
        self._workspace.reserve(columns_of(prepared.ranks), len(self._slices))
        if self._table.put(slot, prepared):
            self._workspace.moved()
        self._note()

    def drop(self, slot: int) -> None:
        """The table's row is cleared on the stream before the memory can be used again."""
        self._table.drop(slot)
        prepared = self._kept.pop(slot)
        if prepared.a.is_cuda:
            for tensor in (prepared.a, prepared.b, prepared.out_scale, prepared.bias):
                if tensor is not None:
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
        self._note()

    def _note(self) -> None:
        held = self._kept.values()
        self._most = (
            max((columns_of(p.ranks) for p in held), default=0),
            max((max(p.ranks) for p in held), default=0),
        )

    def shape(self, tiles: Tiles) -> Shape:
        """The form of the kernels for a step."""
        tokens, count = tiles.order.shape[0], tiles.tiles.shape[0]
        return choose(tiles.block_m, tokens, count, self._width, *self._most, self._itemsize)

    def apply(self, y: Tensor, x: Tensor, segments: Segments) -> None:
        if x.stride(1) != 1 or y.stride(1) != 1:
            raise ValueError(f"expected rows of neighbouring elements, got strides {x.stride()} and {y.stride()}")
        tiles = segments.tiles
        shape = self.shape(tiles)
        columns = self._columns.get(shape.block_n)
        if columns is None:
            columns = self._columns[shape.block_n] = column_table(self._slices, shape.block_n, y.device)
        held = self._workspace.buffers(tiles.order.shape[0], tiles.tiles.shape[0], x.dtype)
        shared = (tiles.tiles, tiles.order, self._table.rows)
        slices = len(self._slices)
        triton_ops.lowrank_shrink(
            x, held.t, held.partial, held.arrived, *shared, triton_ops.shrink_numbers(shape, slices, self._aligned)
        )
        triton_ops.lowrank_expand(held.t, y, *shared, columns, triton_ops.expand_numbers(shape, slices, self._aligned))
