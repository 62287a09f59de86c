"""The gathered operator in Triton: two launches a site, whatever adapters, ranks and kinds a step mixes."""

from __future__ import annotations

import torch
from torch import Tensor

from peftmux.kernels.lowrank import triton_ops
from peftmux.kernels.lowrank.layout import Prepared
from peftmux.kernels.lowrank.segments import Segments
from peftmux.kernels.lowrank.tiles import Tiles
from peftmux.kernels.lowrank.triton_shapes import Shape, choose
from peftmux.kernels.lowrank.triton_table import (
    FIELDS,
    GRANULE,
    HEAD,
    MOST_EXPERTS,
    column_table,
    columns_of,
    record,
)
from peftmux.kernels.lowrank.workspace import workspace
from peftmux.kernels.slots import SlotTable


class TritonPath:
    """One site's adapters as a table of addresses. Used by the thread that runs the model, on its current stream.

    A CUDA graph captured over `Segments.over` goes on serving while the workspace's `generation` stays: it rises with
    the first adapter, the first gate, a slot past the table and a rank past the workspace.
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
        self._table = SlotTable(HEAD + len(slices) * FIELDS, torch.device(device))
        self._aligned = all(n % GRANULE == 0 for n in (in_features, *slices))
        self._columns: dict[int, Tensor] = {}
        self._ranks: dict[int, tuple[int, ...]] = {}
        self._most = (0, 0)
        """Columns of t and rank of a slice, of the widest adapter here."""
        self._ready = False
        """Whether there is a table: from the first adapter on."""
        self._gated = False
        """Whether an adapter with a gate has ever been here."""

    def put(self, slot: int, prepared: Prepared) -> None:
        self._workspace.reserve(columns_of(prepared.ranks), len(self._slices))
        self._table.put(slot, *record(prepared, self._slices))
        self._ranks[slot] = prepared.ranks
        self._ready = True
        if prepared.gated and not self._gated:
            self._gated = True
            self._workspace.moved()
        self._note()

    def drop(self, slot: int) -> None:
        self._table.drop(slot)
        del self._ranks[slot]
        self._note()

    def _note(self) -> None:
        held = self._ranks.values()
        self._most = (max(map(columns_of, held), default=0), max(map(max, held), default=0))

    def shape(self, tiles: Tiles) -> Shape:
        """The form of the kernels for a step."""
        return choose(tiles.block_m, tiles.order.shape[0], self._width, *self._most, self._itemsize, self._gated)

    def apply(self, y: Tensor, x: Tensor, segments: Segments) -> None:
        if not self._ready:
            return
        if x.stride(1) != 1 or y.stride(1) != 1:
            raise ValueError(f"expected rows of neighbouring elements, got strides {x.stride()} and {y.stride()}")
        tiles = segments.tiles
        shape = self.shape(tiles)
        columns = self._columns.get(shape.block_n)
        if columns is None:
            columns = self._columns[shape.block_n] = column_table(self._slices, shape.block_n, y.device)
        held = self._workspace.buffers(tiles.order.shape[0], tiles.tiles.shape[0], x.dtype)
        shared = (tiles.tiles, tiles.order, self._table.tensor)
        slices = len(self._slices)
        triton_ops.lowrank_shrink(
            x, held.t, held.partial, held.arrived, *shared, triton_ops.shrink_numbers(shape, slices, self._aligned)
        )
        triton_ops.lowrank_expand(held.t, y, *shared, columns, triton_ops.expand_numbers(shape, self._aligned))
