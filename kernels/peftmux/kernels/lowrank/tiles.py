"""A step's tokens grouped by adapter and cut into tiles, on the CPU, for kernels that take one tile a program.

The scheduler knows the batch, so nothing is sorted on the device: one buffer is filled here and copied once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from peftmux.kernels.lowrank.segments import Segments

Run = tuple[int, int, int]
"""(slot, start, end) in tokens."""

FIELDS = 4
"""Numbers of a tile: slot, first position, rows, 0."""
_ALIGNED = 4
"""int32 values in 16 bytes."""
PADDING = -1
"""The slot of a tile that stands for nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """On the device. Positions count the tokens that have an adapter, those of one slot together, slots ascending."""

    tiles: Tensor
    """[capacity, 4] int32: slot, first position, rows (at most block_m), 0; of padding the slot is -1."""
    order: Tensor
    """[tokens] int32: the token at each position."""
    owners: Tensor
    """[tokens] int32: each token's slot, 0 for the base model's."""
    block_m: int


def rows_per_tile(tokens: int) -> int:
    """By the number of tokens alone, so that one table serves every site of a step and every mix of adapters.

    Up to 8 tokens each is a tile of its own (no matrix unit, no padding); decode takes the smallest tile that a matrix
    unit takes; prefill takes 64, where a Hopper warp group multiplies.
    """
    return 1 if tokens <= 8 else 16 if tokens <= 256 else 64


def capacity(tokens: int, slots: int, block_m: int) -> int:
    """Tiles that any step of so many tokens, of so many adapters, fits into."""
    return tokens if block_m == 1 else -(-tokens // block_m) + min(tokens, slots)


def lay_out(runs: Sequence[Run], block_m: int, tiles: np.ndarray[Any, Any], order: np.ndarray[Any, Any]) -> None:
    """Fill tiles [capacity, 4] and order [tokens], int32, what they held before forgotten."""
    tiles[:] = (PADDING, 0, 0, 0)
    order[:] = 0
    if not runs:
        return
    slots, starts, ends = np.array(sorted(runs), dtype=np.int32).T
    positions = np.cumsum(ends - starts)
    total = positions[-1]
    positions -= ends - starts
    order[:total] = np.arange(total) + np.repeat(starts - positions, ends - starts)
    first = np.flatnonzero(np.diff(slots, prepend=PADDING))
    begins = positions[first]
    finishes = np.append(begins[1:], total)
    counts = -(-(finishes - begins) // block_m)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    used = tiles[: len(number)]
    used[:, 0] = np.repeat(slots[first], counts)
    used[:, 1] = np.repeat(begins, counts) + number * block_m
    used[:, 2] = np.minimum(np.repeat(finishes, counts) - used[:, 1], block_m)


class TileBuffer:
    """Device memory for the tiles of any step of at most `tokens` tokens of at most `slots` adapters.

    A CUDA graph that was captured over it (see `Segments.over`) runs whatever step it was last filled with. Used by the
    thread that runs the model.
    """

    def __init__(self, tokens: int, slots: int, device: torch.device | str, runs: Sequence[Run] = ()) -> None:
        self.tokens = tokens
        self.block_m = rows_per_tile(tokens)
        self._tiles = capacity(tokens, slots, self.block_m)
        # Each part begins at a multiple of 16 bytes: kernels are compiled for that alignment.
        self._sizes = [FIELDS * self._tiles, -(-tokens // _ALIGNED) * _ALIGNED, tokens]
        self._buffer = torch.empty(sum(self._sizes), dtype=torch.int32, device=device)
        self.fill(runs)
        held, order, owners = self._buffer.split(self._sizes)
        self.tiles = Tiles(held.view(-1, FIELDS), order[:tokens], owners, self.block_m)

    def fill(self, runs: Sequence[Run]) -> None:
        """Take a step's runs: one asynchronous copy on the current stream. ValueError for a step that does not fit."""
        end = max((end for _, _, end in runs), default=0)
        distinct = len({slot for slot, _, _ in runs})
        if end > self.tokens or capacity(end, distinct, self.block_m) > self._tiles:
            raise ValueError(
                f"expected a step of at most {self.tokens} tokens in {self._tiles} tiles, "
                f"got {end} tokens of {distinct} adapters"
            )
        host = torch.empty(self._buffer.shape, dtype=torch.int32, pin_memory=self._buffer.is_cuda)
        tiles, order, owners = (part.numpy() for part in host.split(self._sizes))
        lay_out(runs, self.block_m, tiles.reshape(-1, FIELDS), order)
        owners[:] = 0
        for slot, start, stop in runs:
            owners[start:stop] = slot
        self._buffer.copy_(host, non_blocking=True)


def tiles_of(segments: Segments) -> Tiles:
    """Of one step, in a buffer of its own."""
    return TileBuffer(max(segments.num_tokens, 1), len(segments.slots), segments.device, segments.runs).tiles
