"""What the kernels know of each adapter at one site: addresses and ranks, a row a slot, on the device.

Every adapter's tensors stay where they were loaded, at their true rank. A CUDA graph captures the table's address
alone, so adapters come, go and grow without a new capture.
"""

from __future__ import annotations

import struct
from itertools import accumulate

import torch
from torch import Tensor

from peftmux.kernels.lowrank.layout import Prepared

HEAD = 4
"""Before the slices: out_scale address, bias address (0: none), A address, columns of t (all slices)."""
FIELDS = 6
"""A slice: rank, first column of t, first row in A, B address, scale (the bits of a float32), experts.

A gate's rows follow in A those of every rank: slice by slice, as in `Prepared`.
"""
GRANULE = 16
"""Each slice begins at a column of t that is a multiple of it, so that t is read in whole vectors."""
MOST_EXPERTS = 16
"""That one gate weighs."""


def padded(rank: int) -> int:
    return -(-rank // GRANULE) * GRANULE


def columns_of(ranks: tuple[int, ...]) -> int:
    """Columns of t that an adapter takes."""
    return sum(map(padded, ranks))


def encode(prepared: Prepared, slices: tuple[int, ...]) -> list[int]:
    """One row of the table. `prepared` must outlive the row."""
    ranks = prepared.ranks
    epilogue = [0 if t is None else t.data_ptr() for t in (prepared.out_scale, prepared.bias)]
    row = [*epilogue, prepared.a.data_ptr(), columns_of(ranks)]
    columns = accumulate(map(padded, ranks), initial=0)
    first_rows = accumulate(ranks, initial=0)
    areas = accumulate((r * n for r, n in zip(ranks, slices, strict=True)), initial=0)
    for rank, column, first, area, scale, experts in zip(
        ranks, columns, first_rows, areas, prepared.scales, prepared.experts, strict=False
    ):
        b = prepared.b.data_ptr() + area * prepared.b.element_size()
        row += [rank, column, first, b, struct.unpack("<i", struct.pack("<f", scale))[0], experts]
    return row


class SlotTable:
    """[capacity, HEAD + slices * FIELDS] int64, zeros where nothing is.

    Written by the thread that runs the model, on the stream that runs it, between steps.
    """

    def __init__(self, slices: tuple[int, ...], slots: int, device: torch.device | str) -> None:
        self._slices = slices
        self.rows = torch.zeros(slots, HEAD + len(slices) * FIELDS, dtype=torch.int64, device=device)

    def put(self, slot: int, prepared: Prepared) -> bool:
        """-> whether the table had to move to have room: graphs that captured it are stale then."""
        moved = slot >= len(self.rows)
        if moved:
            wider = self.rows.new_zeros(max(slot + 1, 2 * len(self.rows)), self.rows.shape[1])
            wider[: len(self.rows)] = self.rows
            self.rows = wider
        self._write(slot, encode(prepared, self._slices))
        return moved

    def drop(self, slot: int) -> None:
        self.rows[slot].zero_()

    def _write(self, slot: int, values: list[int]) -> None:
        host = torch.tensor(values, dtype=torch.int64)
        self.rows[slot].copy_(host.pin_memory() if self.rows.is_cuda else host, non_blocking=True)


def column_table(slices: tuple[int, ...], block_n: int, device: torch.device | str) -> Tensor:
    """Which columns each program of `expand` writes: [programs, 4] int32, (slice, first column in it, its width, its
    first column in y)."""
    rows = [
        (index, first, width, start)
        for index, (width, start) in enumerate(zip(slices, accumulate(slices, initial=0), strict=False))
        for first in range(0, width, block_n)
    ]
    return torch.tensor(rows, dtype=torch.int32, device=device)
