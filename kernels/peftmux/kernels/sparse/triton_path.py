"""Sparse changes of a weight by Triton: one launch for all adapters of a step."""

from __future__ import annotations

import warnings

import torch
import triton
from torch import Tensor

from peftmux.kernels.lowrank import Segments
from peftmux.kernels.slots import SlotTable
from peftmux.kernels.sparse import triton_kernels as kernels
from peftmux.kernels.sparse.reference import SparsePart
from peftmux.kernels.sparse.site import PreparedSparse, SparseSite

REGISTERS = 128
"""A thread. Said explicitly, so that ptxas does not spill for the sake of occupancy."""


@torch.library.custom_op("peftmux::add_sparse_", mutates_args={"y"})
def add_sparse_(y: Tensor, x: Tensor, tiles: Tensor, order: Tensor, table: Tensor, block_m: int) -> None:
    """y[t] += D x[t] for the tokens whose slot has a record (see `triton_kernels.sparse_kernel`).

    y: [T, out], x: [T, in], tiles and order as in `lowrank.tiles.Tiles`, table: [S, 3] int64.
    """
    if y.stride(1) != 1 or x.stride(1) != 1 or len(x) != len(y):
        raise ValueError(f"expected rows of neighbouring elements, got strides {y.stride()} and {x.stride()}")
    rows, block_n, block_j = sparse_tile(block_m)
    kernels.sparse_kernel[(len(tiles), triton.cdiv(y.shape[1], block_n))](
        y,
        x,
        tiles,
        order,
        table,
        len(table),
        y.stride(0),
        x.stride(0),
        WIDTH=y.shape[1],
        BLOCK_M=rows,
        BLOCK_N=block_n,
        BLOCK_J=block_j,
        num_warps=4,
        num_stages=1,
        maxnreg=REGISTERS,
    )


def sparse_tile(block_m: int) -> tuple[int, int, int]:
    """(tokens at once, weight rows, entries of each at once) of one program, for tiles of block_m tokens."""
    return (1, 32, 32) if block_m == 1 else (4, 16, 32)


class TritonSparseSite(SparseSite):
    """As its base; holds row starts and columns as int32."""

    graphed = True

    def __init__(self, in_features: int, out_features: int, device: torch.device) -> None:
        super().__init__(in_features, out_features, device)
        self._table = SlotTable(3, device)

    def prepare(self, part: SparsePart) -> PreparedSparse:
        wide = super().prepare(part).matrix
        pieces = (wide.crow_indices().int(), wide.col_indices().int(), wide.values())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: compressed rows are in beta
            matrix = torch.sparse_csr_tensor(*pieces, size=self._shape)
        return PreparedSparse(matrix, sum(t.nbytes for t in pieces))

    def put(self, slot: int, prepared: PreparedSparse) -> None:
        super().put(slot, prepared)
        matrix = prepared.matrix
        self._table.put(slot, matrix.crow_indices(), matrix.col_indices(), matrix.values())

    def drop(self, slot: int) -> None:
        super().drop(slot)
        self._table.drop(slot)

    def apply(self, y: Tensor, x: Tensor, segments: Segments) -> None:
        if segments.touches(self._held):
            tiles = segments.tiles
            add_sparse_(y, x, tiles.tiles, tiles.order, self._table.tensor, tiles.block_m)
