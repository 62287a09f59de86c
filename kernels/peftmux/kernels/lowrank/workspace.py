"""Device memory that the gathered kernels of all sites use one after the other."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peftmux.kernels.lowrank.triton_shapes import MOST_PARTS, MOST_SPLIT_ROWS, power_of_two
from peftmux.kernels.lowrank.triton_table import GRANULE, MOST_EXPERTS

_FIRST_COLUMNS = 512
"""Columns of t to begin with: three slices of rank up to 170. More are taken when an adapter brings them."""
_FIRST_SLICES = 4


@dataclass(slots=True)
class _Buffers:
    """Of one thread, on the stream it launches on."""

    t: Tensor
    partial: Tensor
    arrived: Tensor
    tokens: int
    tiles: int
    columns: int
    slices: int


@dataclass(slots=True, eq=False)
class Workspace:
    """Of one device. Every thread has buffers of its own: a thread launches on one stream at a time.

    `generation` rises whenever something moves that a captured graph knows by its address: whoever replays one
    compares, and captures anew. Before a capture a step of that size has to run, which takes its buffers.
    """

    device: torch.device
    columns: int = _FIRST_COLUMNS
    slices: int = _FIRST_SLICES
    generation: int = 0
    _local: dict[tuple[int, torch.dtype], _Buffers] = field(default_factory=dict)

    def reserve(self, columns: int, slices: int) -> None:
        """Every t from now on has room for so many columns, and partial sums for the gates of so many slices."""
        if columns > self.columns or slices > self.slices:
            self.columns = max(self.columns, power_of_two(columns))
            self.slices = max(self.slices, slices)
            self.generation += 1

    def moved(self) -> None:
        self.generation += 1

    def buffers(self, tokens: int, tiles: int, dtype: torch.dtype) -> _Buffers:
        """Big enough for a step of so many tokens and tiles. `arrived` holds zeros."""
        key = (threading.get_ident(), dtype)
        held = self._local.get(key)
        if (
            held is None
            or tokens > held.tokens
            or tiles > held.tiles
            or (held.columns, held.slices) != (self.columns, self.slices)
        ):
            held = self._local[key] = self._grown(held, tokens, tiles, dtype)
        return held

    def release(self) -> None:
        """The calling thread launches no more: its buffers are given back."""
        own = threading.get_ident()
        for key in [key for key in list(self._local) if key[0] == own]:
            del self._local[key]

    def _grown(self, held: _Buffers | None, tokens: int, tiles: int, dtype: torch.dtype) -> _Buffers:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"expected a step of {tokens} tokens to have run before its graph is captured")
        if held is not None:
            tokens, tiles = max(tokens, held.tokens), max(tiles, held.tiles)
            self.generation += 1
        tokens, tiles = power_of_two(tokens), power_of_two(tiles)
        return _Buffers(
            t=torch.empty(tokens, self.columns, dtype=dtype, device=self.device),
            partial=torch.empty(
                min(MOST_PARTS * tokens, MOST_SPLIT_ROWS),
                self.columns + self.slices * MOST_EXPERTS,
                device=self.device,
            ),
            arrived=torch.zeros(tiles, self.columns // GRANULE, dtype=torch.int32, device=self.device),
            tokens=tokens,
            tiles=tiles,
            columns=self.columns,
            slices=self.slices,
        )


_workspaces: dict[torch.device, Workspace] = {}


def workspace(device: torch.device | str) -> Workspace:
    """The one of this device."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _workspaces.setdefault(device, Workspace(device))


def release() -> None:
    """The calling thread launches no more, on any device."""
    for held in list(_workspaces.values()):
        held.release()
