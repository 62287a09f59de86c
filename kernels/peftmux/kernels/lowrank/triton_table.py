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


def bits(scale: float) -> int:
    """Of a float32."""
    (number,) = struct.unpack("<i", struct.pack("<f", scale))
    return int(number)


def record(prepared: Prepared, slices: tuple[int, ...]) -> list[Tensor | int]:
    """One row of the table, a tensor for its address."""
    ranks = prepared.ranks
    values: list[Tensor | int] = [0 if t is None else t for t in (prepared.out_scale, prepared.bias)]
    values += [prepared.a, columns_of(ranks)]
    columns = accumulate(map(padded, ranks), initial=0)
    first_rows = accumulate(ranks, initial=0)
    areas = prepared.b.split([r * n for r, n in zip(ranks, slices, strict=True)])
    pieces = zip(ranks, columns, first_rows, areas, prepared.scales, prepared.experts, strict=False)
    for rank, column, first, area, scale, experts in pieces:
        values += [rank, column, first, area, bits(scale), experts]
    return values


def column_table(slices: tuple[int, ...], block_n: int, device: torch.device | str) -> Tensor:
    """Which columns each program of `expand` writes: [programs, 4] int32, (slice, first column in it, its width, its
    first column in y)."""
    rows = [
        (index, first, width, start)
        for index, (width, start) in enumerate(zip(slices, accumulate(slices, initial=0), strict=False))
        for first in range(0, width, block_n)
    ]
    return torch.tensor(rows, dtype=torch.int32, device=device)
