"""Rows of decode steps in buffers that stay where they are, for a captured CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from peftmux.kernels.attention.rows import AttentionRows
from peftmux.kernels.attention.tiles import FIELDS, HEADER, SPLIT_KEYS, SPLITS, Launch, Tiles, pack, pinned


@dataclass(frozen=True, eq=False, kw_only=True)
class StaticRows(AttentionRows):
    """What stands for a step's rows while a graph is captured, and holds those of every step that replays it.

    Launches read how much work there is on the device: their grids follow from the capacity alone, and a program
    without work ends. Only for paths that read `tiles`; run the model once before it is captured, so that kernels are
    compiled and counters are large enough.
    """

    fixed: Tiles
    capacity: int
    """Tokens of the flat batch, padding included."""
    block_size: int

    @classmethod
    def decode(cls, tokens: int, blocks: int, block_size: int, device: torch.device | str) -> StaticRows:
        """For steps of at most `tokens` rows of one query and at most `blocks` blocks each. Holds no row yet."""
        parts = min(SPLITS, max(1, -(-blocks * block_size // SPLIT_KEYS)))
        items = tokens * parts
        numbers = HEADER + items * len(FIELDS) + tokens * blocks
        none = Launch(0, 0, 0)
        fixed = Tiles(
            torch.zeros(numbers, dtype=torch.int32, device=device),
            (Launch(items, items if parts > 1 else 0, HEADER), none, none),
        )
        own = cls((), (), (0,), 0, (), torch.device(device), 1, fixed=fixed, capacity=tokens, block_size=block_size)
        own.fill(AttentionRows.build([], [], [], device))
        return own

    def fill(self, rows: AttentionRows) -> None:
        """The rows of the next replay, on the current stream; tokens past them give zeros.

        Raises ValueError where a row has several queries, and where they do not fit.
        """
        table, launches = pack(rows, self.capacity, self.block_size, (1, 1), spans=False)
        if any(launch.items for launch in launches[1:]):
            raise ValueError(f"expected rows of one query, got one of {rows.longest}")
        fits = self.fixed.table.numel()
        if rows.num_tokens > self.capacity or len(table) > fits:
            raise ValueError(
                f"expected at most {self.capacity} rows and {fits} numbers, got {rows.num_tokens} and {len(table)}"
            )
        self.fixed.table[: len(table)].copy_(pinned(table, self.device), non_blocking=True)

    def tiles(self, tokens: int, block_size: int, queries: tuple[int, int]) -> Tiles:
        if (tokens, block_size) != (self.capacity, self.block_size):
            raise ValueError(
                f"expected {self.capacity} tokens and blocks of {self.block_size}, got {tokens} and {block_size}"
            )
        return self.fixed

    @cached_property
    def table(self) -> Tensor:
        raise RuntimeError("expected a path that reads tiles: these rows have no table")
