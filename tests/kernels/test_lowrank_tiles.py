"""The tokens of a step grouped by adapter: what the gathered kernels read, checked against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftmux.kernels.lowrank import Segments
from peftmux.kernels.lowrank.tiles import PADDING, TileBuffer, capacity, lay_out, rows_per_tile

rows = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), max_size=12)


def expected(segments: Segments, block_m: int) -> tuple[list[tuple[int, list[int]]], list[int]]:
    """-> ((slot, its tokens) of each tile, the tokens at each position)."""
    owner = segments.slot_of_token.tolist()
    order = [token for slot in segments.slots for token, own in enumerate(owner) if own == slot]
    tiles = []
    for slot in segments.slots:
        tokens = [token for token in order if owner[token] == slot]
        tiles += [(slot, tokens[i : i + block_m]) for i in range(0, len(tokens), block_m)]
    return tiles, order


@given(rows, st.sampled_from([1, 16, 64]))
def test_every_token_with_an_adapter_is_in_one_tile(rows: list[tuple[int, int]], block_m: int) -> None:
    segments = Segments.build([s for s, _ in rows], [n for _, n in rows])
    count = segments.num_tokens
    tiles = np.full((capacity(count, len(segments.slots), block_m) + 1, 4), 77, np.int32)
    order = np.full(count, 77, np.int32)
    lay_out(segments.runs, block_m, tiles, order)
    want, positions = expected(segments, block_m)
    assert order[: len(positions)].tolist() == positions
    assert not order[len(positions) :].any()
    got = [(slot, order[at : at + n].tolist()) for slot, at, n, _ in tiles.tolist() if slot != PADDING]
    assert got == want
    assert (tiles[len(want) :, 0] == PADDING).all(), "one row more than any step needs"


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (8, 1), (9, 16), (256, 16), (257, 64), (8192, 64)])
def test_rows_of_a_tile_follow_the_tokens(tokens: int, rows: int) -> None:
    assert rows_per_tile(tokens) == rows
    assert Segments.build([3], [tokens]).tiles.block_m == rows


def test_one_buffer_takes_step_after_step() -> None:
    buffer = TileBuffer(24, 3, "cpu")
    captured = Segments.over(buffer, "cpu")
    before = [t.data_ptr() for t in (captured.tiles.tiles, captured.tiles.order)]
    assert captured.tiles.tiles[:, 0].tolist() == [PADDING] * 5
    for slots, lens in (([1, 2, 3], [20, 2, 2]), ([4], [1]), ([], []), ([2, 0, 2], [3, 4, 5])):
        segments = Segments.build(slots, lens)
        buffer.fill(segments.runs)
        tiles, order = captured.tiles.tiles.tolist(), captured.tiles.order.tolist()
        got = [(slot, order[at : at + n]) for slot, at, n, _ in tiles if slot != PADDING]
        assert got == expected(segments, 16)[0]
    assert [t.data_ptr() for t in (captured.tiles.tiles, captured.tiles.order)] == before


def test_a_step_that_does_not_fit_is_refused() -> None:
    buffer = TileBuffer(24, 3, "cpu")
    with pytest.raises(ValueError, match="at most 24 tokens in 5 tiles, got 25 tokens of 1 adapters"):
        buffer.fill([(1, 0, 25)])
    with pytest.raises(ValueError, match="got 24 tokens of 4 adapters"):
        buffer.fill([(s, 6 * s - 6, 6 * s) for s in (1, 2, 3, 4)])


def test_a_captured_step_is_applied_to_whatever_it_is_filled_with() -> None:
    segments = Segments.over(TileBuffer(4, 4, "cpu"), "cpu")
    assert not segments.runs
    assert segments.num_tokens == 4
    assert segments.tiles.order.dtype is torch.int32
