"""The gathered kernels in Triton's interpreter against the definition in float64, over mixes that a batch can hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftmux.kernels.lowrank import LinearPart, LowRankSite, Segments
from peftmux.kernels.lowrank import triton_ops as ops
from peftmux.kernels.lowrank.layout import prepare
from peftmux.kernels.lowrank.tiles import TileBuffer
from peftmux.kernels.lowrank.triton_path import TritonPath
from peftmux.kernels.lowrank.triton_table import column_table
from tests.triton.lowrank_cases import (
    ADAPTERS,
    EVEN,
    FAR_SLOT,
    LONG,
    MIXES,
    ODD,
    Launches,
    Widths,
    batch,
    bound,
    exact,
    make_parts,
    make_path,
    poison,
)
from tests.triton.operators import written


def run(path: TritonPath, segments: Segments, y: Tensor, x: Tensor) -> Tensor:
    """y after one step over poisoned buffers. What counts arrivals must count from zero again."""
    held = poison(path, segments, y.dtype)
    got = y.clone()
    path.apply(got, x, segments)
    assert not held.arrived.any()
    return got


def check(path: TritonPath, segments: Segments, widths: Widths, dtype: torch.dtype) -> Tensor:
    y, x = batch(segments.num_tokens, widths, dtype)
    expected, size = exact(y, x, segments, widths)
    got = run(path, segments, y, x)
    own = slice(0, segments.num_tokens)
    error = (got[own].double() - expected[own]).abs()
    assert bool((error <= bound(expected[own], size[own], dtype)).all()), error.max()
    assert bool(got[segments.num_tokens :].isnan().all()), "rows past the end"
    resident = torch.tensor([slot in ADAPTERS for slot in segments.slot_of_token.tolist()], dtype=torch.bool)
    assert torch.equal(got[own][~resident], y[own][~resident])
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_every_mix(mix: str, dtype: torch.dtype) -> None:
    check(make_path(EVEN, dtype), Segments.build(*MIXES[mix]), EVEN, dtype)


@pytest.mark.parametrize("mix", ["distinct", "zipf", "prefill beside decode"])
def test_odd_widths(mix: str) -> None:
    check(make_path(ODD, torch.float16), Segments.build(*MIXES[mix]), ODD, torch.float16)


# tokens of (gated, plain) adapters -> rows of a tile
@pytest.mark.parametrize(
    ("lens", "block_m"), [((2, 1), 1), ((5, 9), 16), ((20, 290), 64)], ids=["rows", "decode", "prefill"]
)
@pytest.mark.parametrize("widths", [EVEN, LONG], ids=["three slices", "one slice"])
def test_which_kernels_run(
    lens: tuple[int, int], block_m: int, widths: Widths, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = Launches(monkeypatch)
    path = make_path(widths, torch.bfloat16, (7, 1))
    segments = Segments.build([7, 0, 1], [lens[0], 3, lens[1]])
    parts = path.shape(segments.tiles).parts
    assert parts == widths[0] // {1: 256, 16: 128, 64: 64}[block_m]
    got = check(path, segments, widths, torch.bfloat16)
    assert torch.equal(check(path, segments, widths, torch.bfloat16)[: len(got) - 3], got[:-3]), "the same bits again"
    assert launches.names() == ["shrink", "expand"] * 2
    (_, shrink_grid, shrink), (_, expand_grid, expand) = launches.seen[:2]
    assert (shrink["BLOCK_M"], expand["BLOCK_M"]) == (block_m, block_m)
    assert (shrink["SPLIT"], shrink_grid[2]) == (parts > 1, parts)
    assert (shrink["SLICES"], shrink["ALIGNED"]) == (len(widths[1]), True)
    assert expand_grid[1] == sum(-(-n // expand["BLOCK_N"]) for n in widths[1])


def test_one_graph_runs_any_step() -> None:
    """What a CUDA graph captures is fixed: buffers, tables, grids. Steps, adapters and ranks then change under it."""
    dtype = torch.bfloat16
    path = make_path(EVEN, dtype, (5, 7))
    buffer = TileBuffer(20, 6, "cpu")
    captured = Segments.over(buffer, "cpu")
    shape = path.shape(captured.tiles)
    generation = path._workspace.generation
    y, x = batch(20, EVEN, dtype, padding=0)
    columns = column_table(EVEN[1], shape.block_n, "cpu")
    held = path._workspace.buffers(20, len(captured.tiles.tiles), dtype)
    shared = (captured.tiles.tiles, captured.tiles.order, path._table.tensor)

    def replay() -> Tensor:
        got = y.clone()
        held.t.fill_(torch.nan)
        held.partial.fill_(torch.nan)
        ops.lowrank_shrink(x, held.t, held.partial, held.arrived, *shared, ops.shrink_numbers(shape, 3, True))
        ops.lowrank_expand(held.t, got, *shared, columns, ops.expand_numbers(shape, True))
        return got

    assert torch.equal(replay(), y)
    for put, drop, rows in (
        ([4], [5], ([4, 0, 7], [9, 3, 2])),
        ([1], [4], ([4, 0, 7, 1], [9, 3, 2, 1])),
        ([8, 2], [1], ([8, 2, 1], [1, 18, 1])),
    ):
        for slot in put:
            path.put(slot, prepare(make_parts(slot, EVEN), *EVEN, dtype, torch.device("cpu")))
        for slot in drop:
            path.drop(slot)
        segments = Segments.build(*rows)
        buffer.fill(segments.runs)
        here = Segments(
            tuple(run for run in segments.runs if run[0] in path._ranks), segments.num_tokens, captured.device, 1
        )
        expected, size = exact(y, x, here, EVEN)
        got = replay()
        assert bool(((got.double() - expected).abs() <= bound(expected, size, dtype)).all())
        untouched = here.slot_of_token == 0
        assert torch.equal(got[: len(untouched)][untouched], y[: len(untouched)][untouched])
        assert torch.equal(got[len(untouched) :], y[len(untouched) :])
    assert path._workspace.generation == generation, "nothing moved that a graph knows"


def test_what_moves_is_announced() -> None:
    path = make_path(EVEN, torch.float32, ())
    space = path._workspace
    before = space.generation
    path.put(1, prepare(make_parts(1, EVEN), *EVEN, torch.float32, torch.device("cpu")))
    assert space.generation == before + 1, "the table was made"
    path.put(4, prepare(make_parts(4, EVEN), *EVEN, torch.float32, torch.device("cpu")))
    assert space.generation == before + 1
    path.put(FAR_SLOT, prepare(make_parts(1, EVEN), *EVEN, torch.float32, torch.device("cpu")))
    assert space.generation == before + 2, "the table grew"
    path.put(7, prepare(make_parts(7, EVEN), *EVEN, torch.float32, torch.device("cpu")))
    assert space.generation == before + 3, "the first gate"
    rank = space.columns + 1
    wide = LinearPart(torch.randn(rank, EVEN[0]) / 23, torch.randn(EVEN[1][0], rank) / rank**0.5)
    path.put(2, prepare([wide, None, None], *EVEN, torch.float32, torch.device("cpu")))
    assert space.generation == before + 4, "t grew"
    y, x = batch(3, EVEN, torch.float32, padding=0)
    segments = Segments.build([FAR_SLOT, 2, 1], [1, 1, 1])
    got = run(path, segments, y, x)
    expected, size = exact(y, x, Segments.build([1, 0, 1], [1, 1, 1]), EVEN)
    assert wide.a is not None
    assert wide.b is not None
    columns = slice(0, EVEN[1][0])
    expected[1, columns] += x[1].double() @ wide.a.double().T @ wide.b.double().T
    size[1, columns] += x[1].double().abs() @ wide.a.double().abs().T @ wide.b.double().abs().T
    assert bool(((got.double() - expected).abs() <= 1e-6 * size).all())


def test_rows_of_y_and_x_may_stand_apart() -> None:
    path = make_path(EVEN, torch.float32)
    segments = Segments.build([7, 1], [2, 5])
    y, x = batch(7, EVEN, torch.float32, padding=0)
    expected = run(path, segments, y, x)
    wide_y = torch.cat([y, torch.full((7, 9), torch.nan)], dim=1)
    wide_x = torch.cat([torch.full((7, 5), torch.nan), x], dim=1)
    path.apply(wide_y[:, : y.shape[1]], wide_x[:, 5:], segments)
    assert torch.equal(wide_y[:, : y.shape[1]], expected)
    assert bool(wide_y[:, y.shape[1] :].isnan().all())
    with pytest.raises(ValueError, match="neighbouring elements"):
        path.apply(y, torch.stack([x, x], 2)[:, :, 0], segments)


def test_the_operators_are_known_to_torch() -> None:
    path = make_path(EVEN, torch.float32, (1, 2))
    segments = Segments.build([1, 2], [1, 1])
    y, x = batch(2, EVEN, torch.float32, padding=0)
    shape = path.shape(segments.tiles)
    held = path._workspace.buffers(2, 2, torch.float32)
    shared = (segments.tiles.tiles, segments.tiles.order, path._table.tensor)
    arguments = (x, held.t, held.partial, held.arrived, *shared, ops.shrink_numbers(shape, 3, True))
    assert written(ops.lowrank_shrink, arguments) == {"t", "partial"}, "`arrived` ends as it began"
    columns = column_table(EVEN[1], shape.block_n, "cpu")
    expansion = (torch.randn_like(held.t), y, *shared, columns, ops.expand_numbers(shape, True))
    assert written(ops.lowrank_expand, expansion) == {"y"}


def test_more_experts_than_a_program_weighs_are_refused() -> None:
    part = LinearPart(torch.randn(17, 63), torch.randn(5, 17), gate=torch.randn(17, 63))
    with pytest.raises(ValueError, match="at most 16 experts on this device, got 17"):
        prepare([part], 63, (5,), torch.float32, torch.device("cpu"), None, TritonPath.most_experts)


def test_the_cpu_keeps_its_own_forms() -> None:
    assert LowRankSite(63, (5,), torch.bfloat16).path in ("native", "torch")
