"""Which rows a flat batch holds, and where the cache keeps what each of them sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from peftmux.kernels.attention.reference import visible
from peftmux.kernels.attention.tiles import Tiles, blocks_array


@dataclass(frozen=True, eq=False)
class AttentionRows:
    """The rows of one step, built once and read by every layer.

    Row r owns tokens query_starts[r] .. query_starts[r + 1] of the flat batch. Its query i stands at cache index
    context_lens[r] - query_lens[r] + i: a context counts every key of the row, those of its new tokens included.
    Tokens past the last row are padding.
    """

    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    query_starts: tuple[int, ...]
    """[R + 1], in tokens of the flat batch."""
    num_decode: int
    """The leading rows that have one query each."""
    block_tables: tuple[Sequence[int], ...]
    device: torch.device
    threads: int
    """How many threads torch gives the thread that built this."""
    _gathers: dict[tuple[int, int, int, int], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _seen: dict[tuple[int, int, int, int], Tensor] = field(default_factory=dict, repr=False)
    _tiles: dict[tuple[int, int, tuple[int, int]], Tiles] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
    ) -> AttentionRows:
        """All three in flat-batch order, decode rows (one query) first. A table may be longer than its context needs.

        Raises ValueError where the three do not fit together. That a table is long enough for its context is the
        scheduler's invariant.
        """
        if not len(query_lens) == len(context_lens) == len(block_tables):
            raise ValueError(
                f"expected one context and one block table for each of {len(query_lens)} rows, "
                f"got {len(context_lens)} and {len(block_tables)}"
            )
        for row, (q, n) in enumerate(zip(query_lens, context_lens, strict=True)):
            if not 1 <= q <= n:
                raise ValueError(f"row {row}: expected 1 <= query_len <= context_len, got {q} and {n}")
        starts = (0, *accumulate(query_lens))
        decode = next((r for r, q in enumerate(query_lens) if q != 1), len(query_lens))
        return cls(
            tuple(query_lens),
            tuple(context_lens),
            starts,
            decode,
            tuple(block_tables),
            torch.device(device),
            torch.get_num_threads(),
        )

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1]

    @cached_property
    def longest(self) -> int:
        """The most queries that a row has."""
        return max(self.query_lens, default=0)

    @cached_property
    def table(self) -> Tensor:
        """[R + 1, 2 + W] int32 on the device: query start, context, then the blocks, zero-padded; the last row only
        holds the end of the batch."""
        table = _pack(self.query_starts, self.context_lens, self.block_tables)
        return table if self.device.type == "cpu" else table.pin_memory().to(self.device, non_blocking=True)

    @cached_property
    def table_address(self) -> int:
        return self.table.data_ptr()

    def tiles(self, tokens: int, block_size: int, queries: tuple[int, int]) -> Tiles:
        """The same rows as Triton's launches read them; arguments of `Tiles.of`."""
        key = (tokens, block_size, queries)
        if key not in self._tiles:
            self._tiles[key] = Tiles.of(self, *key)
        return self._tiles[key]

    def gather(self, first: int, last: int, window: int, block_size: int) -> tuple[Tensor, Tensor]:
        """Where rows first .. last find the keys that their queries can see.

        -> (slots [rows, S] int64 into the flattened cache, positions [rows, S] int64: the key's cache index, or -1 for
        filling). Filling repeats the row's first visible key, so that no memory is read that the row does not own.
        """
        key = (first, last, window, block_size)
        if key not in self._gathers:
            self._gathers[key] = self._gather(*key)
        return self._gathers[key]

    def seen(self, first: int, last: int, window: int, block_size: int) -> Tensor:
        """[rows, Q, S] bool: which of the keys that `gather` finds each query sees; the rows have equally many."""
        key = (first, last, window, block_size)
        if key not in self._seen:
            _, positions = self.gather(*key)
            queries = self.query_lens[first]
            index = self.table[first:last, 1:2].long() - queries + torch.arange(queries, device=positions.device)
            self._seen[key] = visible(index, positions, window)
        return self._seen[key]

    def _gather(self, first: int, last: int, window: int, block_size: int) -> tuple[Tensor, Tensor]:
        contexts, queries = self.context_lens[first:last], self.query_lens[first:last]
        lows = [max(0, n - q + 1 - window) if window else 0 for n, q in zip(contexts, queries, strict=True)]
        width = max(n - low for n, low in zip(contexts, lows, strict=True))
        device = self.table.device
        low = torch.tensor(lows, device=device).unsqueeze(1)
        positions = low + torch.arange(width, device=device)
        live = positions < self.table[first:last, 1:2]
        reads = torch.where(live, positions, low)
        blocks = self.table[first:last, 2:].gather(1, reads // block_size).long()
        return blocks * block_size + reads % block_size, torch.where(live, positions, -1)


def _pack(starts: Sequence[int], contexts: Sequence[int], tables: Sequence[Sequence[int]]) -> Tensor:
    packed = np.zeros((len(starts), 2 + max(map(len, tables), default=0)), dtype=np.int32)
    packed[:, 0] = starts
    packed[:-1, 1] = contexts
    for row, table in zip(packed, tables, strict=False):
        row[2 : 2 + len(table)] = blocks_array(tuple(table))
    return torch.from_numpy(packed)
