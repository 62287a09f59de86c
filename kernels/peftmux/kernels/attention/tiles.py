"""The rows of a step cut into equal pieces of work, as Triton's programs read them: one table, one copy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from peftmux.kernels.attention.rows import AttentionRows

Ints = NDArray[np.int32]

HEADER = 8
FIELDS = ("token", "tokens", "at", "step", "blocks", "split", "splits", "partial")
"""Of an item: its first token in the flat batch, how many, the cache index of the first, how much that grows from one
to the next (0: all stand at the same), where in the table the row's blocks begin, which part of the keys it sums of how
many, and where its partial sum goes (the parts of one tile have neighbouring places)."""

DECODE, SHORT, WHOLE = KINDS = (0, 1, 2)
"""Of items: one token; some tokens of a row with few queries and a long context; a full tile, whose keys are one
program's."""
SPLIT_KEYS = 256
"""The fewest keys that one program of several sums."""
SPLITS = 32
"""The most parts that a row's keys are cut into, over all of its tiles."""


@dataclass(frozen=True, slots=True)
class Launch:
    """The items of one kind."""

    items: int
    """As many as there can be: a launch's grid follows from it."""
    partials: int
    """Places for partial sums."""
    first: int
    """Where the items lie in the table."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """What the programs of a step read.

    Neighbouring rows of one query that see the same context in the same blocks are the tokens of an image, and become
    one row whose queries all stand at its end. Tokens past the last row are items without a key, whose result is zero.
    How a row is cut depends on nothing but the row.
    """

    table: Tensor
    """int32: the number of items of each kind, filling up to HEADER, the items, then the blocks of all rows."""
    launches: tuple[Launch, ...]
    """By kind."""

    @classmethod
    def of(cls, rows: AttentionRows, tokens: int, block_size: int, queries: tuple[int, int]) -> Tiles:
        """`tokens` of the flat batch, those past the last row included; `queries` tokens a SHORT and a WHOLE tile."""
        table, launches = pack(rows, tokens, block_size, queries)
        return cls(pinned(table, rows.device).to(rows.device, non_blocking=True), launches)


def pinned(table: Ints, device: torch.device) -> Tensor:
    """On the host, in memory from which a copy to the device is asynchronous."""
    tensor = torch.from_numpy(table)
    return tensor if device.type == "cpu" else tensor.pin_memory()


def pack(
    rows: AttentionRows, tokens: int, block_size: int, queries: tuple[int, int], spans: bool = True
) -> tuple[Ints, tuple[Launch, ...]]:
    """-> (the table, its launches). Without spans every row of one query stays one."""
    first, merged = _spans(rows) if spans else _each(rows)
    context = np.array(rows.context_lens, dtype=np.int32)[first]
    token = np.array(rows.query_starts[:-1], dtype=np.int32)[first]
    own = np.array(rows.query_lens, dtype=np.int32)[first]
    step = (merged == 1).astype(np.int32)
    at = context - np.where(merged == 1, own, 1).astype(np.int32)
    flat, blocks = _blocks(rows, first, context, block_size)
    whole = np.stack([token, own * merged, at, step, blocks], axis=1)  # what a tile is, of whole rows
    splits = _splits(whole, queries[0])
    one = whole[:, 1] == 1
    items = (
        _items(np.concatenate([whole[one], _padding(rows.num_tokens, tokens)]), 1, SPLITS),
        _items(whole[~one & (splits > 1)], queries[0], SPLITS),
        _items(whole[~one & (splits <= 1)], queries[1], 1),
    )
    begin = HEADER
    launches = []
    for table, partials in items:
        launches.append(Launch(len(table), partials, begin))
        begin += table.size
    header = np.zeros(HEADER, dtype=np.int32)
    header[: len(KINDS)] = [len(table) for table, _ in items]
    for table, _ in items:
        table[:, FIELDS.index("blocks")] += begin
    return np.concatenate([header, *(table.ravel() for table, _ in items), flat]), tuple(launches)


def _spans(rows: AttentionRows) -> tuple[Ints, Ints]:
    """Rows that are one: -> (the first row of each, how many)."""
    number = len(rows.query_lens)
    starts = [
        r
        for r in range(number)
        if r == 0
        or rows.context_lens[r] != rows.context_lens[r - 1]
        or rows.query_lens[r] != 1
        or rows.query_lens[r - 1] != 1
        or rows.block_tables[r] != rows.block_tables[r - 1]
    ]
    first = np.array(starts, dtype=np.int32)
    return first, np.diff(first, append=np.int32(number)).astype(np.int32)


def _each(rows: AttentionRows) -> tuple[Ints, Ints]:
    number = len(rows.query_lens)
    return np.arange(number, dtype=np.int32), np.ones(number, dtype=np.int32)


def _blocks(rows: AttentionRows, first: Ints, context: Ints, block_size: int) -> tuple[Ints, Ints]:
    """-> (the blocks that hold the rows' contexts, one row after the other; where each row's begin)."""
    needed = -(-context // block_size)
    own = [
        blocks_array(tuple(rows.block_tables[row]))[:count]
        for row, count in zip(first.tolist(), needed.tolist(), strict=True)
    ]
    flat = np.concatenate(own) if own else np.zeros(0, dtype=np.int32)
    return flat, (np.cumsum(needed) - needed).astype(np.int32)


@lru_cache(maxsize=512)
def blocks_array(blocks: tuple[int, ...]) -> Ints:
    """Of a row's table, which changes once in block_size steps. To be read only."""
    return np.array(blocks, dtype=np.int32)


def _padding(start: int, stop: int) -> Ints:
    """Tokens that see nothing."""
    token = np.arange(start, stop, dtype=np.int32)
    zero = np.zeros_like(token)
    return np.stack([token, zero + 1, zero - 1, zero, zero], axis=1)


def _splits(rows: Ints, queries: int) -> Ints:
    """How many parts each row's tiles of `queries` tokens are cut into."""
    _, own, at, step, _ = rows.T
    tiles = -(-own // queries)
    keys = at + step * (own - 1) + 1
    splits: Ints = np.minimum(SPLITS // np.maximum(tiles, 1), -(-keys // SPLIT_KEYS)).astype(np.int32)
    return splits


def _items(rows: Ints, queries: int, most: int) -> tuple[Ints, int]:
    """Rows into tiles of at most `queries` tokens, each into parts, at most `most` over a row, the longest first.

    -> ([items, FIELDS], places for partial sums).
    """
    if not len(rows):
        return np.zeros((0, len(FIELDS)), dtype=np.int32), 0
    tiles = -(-rows[:, 1] // queries)
    row, index = _repeat(tiles)
    token, own, at, step, blocks = rows[row].T
    offset = index * queries
    tokens = np.minimum(own - offset, queries)
    at = at + step * offset
    keys = at + step * (tokens - 1) + 1
    splits = np.clip(-(-keys // SPLIT_KEYS), 1, np.maximum(most // np.maximum(tiles[row], 1), 1))
    order = np.argsort(-(keys // splits), kind="stable")
    tile, split = _repeat(splits[order])
    places = np.where(splits > 1, splits, 0)[order]
    partial = (np.cumsum(places) - places)[tile] + split
    chosen = order[tile]
    columns = (column[chosen] for column in (token + offset, tokens, at, step, blocks))
    items = np.stack([*columns, split, splits[chosen], partial], axis=1)
    return items.astype(np.int32), int(places.sum())


def _repeat(counts: Ints) -> tuple[Ints, Ints]:
    """counts[i] times i, and which of them each is."""
    which = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return which, (np.arange(len(which), dtype=np.int32) - (np.cumsum(counts) - counts)[which]).astype(np.int32)
