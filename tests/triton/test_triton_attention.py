"""Paged attention's kernels in Triton's interpreter against exact attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peftmux.kernels.attention import (
    AttentionRows,
    StaticRows,
    paged_attention,
    triton_kernels,
    triton_ops,
    triton_shapes,
)
from peftmux.kernels.attention.tiles import DECODE, SHORT, WHOLE
from peftmux.kernels.attention.triton_path import TritonAttention
from tests.triton.attention_cases import MIXES, OPTIONS, Case, Request, check, make_case
from tests.triton.operators import written

SMALL = (4, 2, 32, 32, 16)

# query heads, key/value heads, key width, value width, block size
SHAPES = {
    "80": (2, 2, 80, 80, 16),
    "96": (3, 1, 96, 96, 8),
    "256": (2, 1, 256, 256, 32),
    "192 and 128": (2, 2, 192, 128, 16),
    "odd widths": (2, 1, 63, 60, 16),
    "more heads than a tile": (40, 1, 16, 24, 1),
    "seven heads": (14, 2, 64, 64, 16),
}
FEW = [Request(1, 40, prefix=True), Request(1, 33), Request(7, 21), Request(8, 12, spans=((5, 11),))]


@pytest.fixture(autouse=True)
def _guarded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the operator allocates is nan, with 64 elements past its end that must stay as they are."""
    held: list[Tensor] = []

    def empty(*size: Any, dtype: torch.dtype, device: Any) -> Tensor:
        shape = torch.Size(size[0] if isinstance(size[0], (tuple, torch.Size)) else size)
        whole = torch.full((shape.numel() + 64,), torch.nan, dtype=dtype)
        whole[shape.numel() :] = 7.0
        held.append(whole)
        return whole[: shape.numel()].view(shape)

    monkeypatch.setattr(triton_ops, "empty", empty)
    yield
    assert all(bool((whole[-64:] == 7.0).all()) for whole in held), "written past the end"


def run(case: Case, rows: AttentionRows | None = None) -> Tensor:
    path = TritonAttention("cpu", case.q.dtype)
    out = case.run(path, rows)
    assert not path._counters[0].any(), "counters are zero between launches"
    return out


@pytest.mark.parametrize(
    ("mix", "options"),
    [(mix, options) for mix in ("decode", "chunks", "everything") for options in OPTIONS]
    + [("long", options) for options in ("plain", "sinks", "all")],
)
def test_every_mix_and_option(mix: str, options: str) -> None:
    case = make_case(SMALL, MIXES[mix], OPTIONS[options], torch.float32)
    check(case, run(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("mix", ["everything", "long"])
def test_narrow_dtypes(mix: str, options: str, dtype: torch.dtype) -> None:
    case = make_case(SMALL, MIXES[mix], OPTIONS[options], dtype)
    check(case, run(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape: str, dtype: torch.dtype) -> None:
    case = make_case(SHAPES[shape], FEW, OPTIONS["all"], dtype)
    check(case, run(case))


def test_equals_the_definition() -> None:
    case = make_case(SMALL, MIXES["everything"], OPTIONS["all"], torch.float32)
    expected = paged_attention(case.q, case.k_cache, case.v_cache, case.rows, **case.options)
    torch.testing.assert_close(run(case), expected, rtol=0, atol=1e-5)


def test_no_row_and_no_token() -> None:
    case = make_case(SMALL, [], {}, torch.float32)
    check(case, run(case))
    case = make_case(SMALL, [], {}, torch.float32, padding=0)
    assert run(case).shape == (0, 4, 32)


def test_large_scores_do_not_overflow() -> None:
    case = make_case(SMALL, FEW, {"scale": 500.0}, torch.float32)
    expected = paged_attention(case.q, case.k_cache, case.v_cache, case.rows, **case.options)
    torch.testing.assert_close(run(case), expected, rtol=0, atol=2e-2)  # a score of some 1e4 is known to 1e-3


def test_a_window_wider_than_a_part() -> None:
    """The window leaves fewer parts than the context would have."""
    case = make_case(SMALL, [Request(1, 1500), Request(2, 1100)], {"window": 300}, torch.float32)
    check(case, run(case))


@pytest.mark.parametrize("options", ["plain", "all"])
def test_bits_repeat_and_depend_on_nobody_else(options: str) -> None:
    requests = [*MIXES["everything"][:5], Request(1, 700), Request(3, 600), Request(30, 90)]
    case = make_case(SMALL, requests, OPTIONS[options], torch.bfloat16)
    together = run(case)
    assert torch.equal(run(case), together)
    for request in range(len(requests)):
        alone, own = case.alone(request)
        assert torch.equal(run(alone), together[own]), requests[request]


def test_queries_may_stand_apart() -> None:
    case = make_case(SMALL, FEW, {}, torch.float32)
    expected = run(case)
    fused = torch.cat([case.q.flatten(1), torch.full((case.q.shape[0], 16), torch.nan)], dim=1)
    case.q = fused[:, : 4 * 32].view(-1, 4, 32)
    assert torch.equal(run(case), expected)
    case.q = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(run(case), expected)
    case.q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run(case), expected)


def test_images_are_tiles_and_short_rows_are_split() -> None:
    """16 queries a tile in float32, two heads of a key/value head: 8 tokens."""
    requests = [Request(1, 40), Request(20, 20, spans=((2, 20),)), Request(3, 600), Request(64, 64)]
    case = make_case(SMALL, requests, {}, torch.float32, padding=2)
    tiles = case.rows.tiles(case.q.shape[0], 16, (8, 8))
    assert [launch.items for launch in tiles.launches] == [1 + 2, 3, 1 + 3 + 8]
    assert [launch.partials for launch in tiles.launches] == [0, 3, 0]


@pytest.mark.parametrize("kind", [DECODE, SHORT, WHOLE])
def test_each_kind_is_launched(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[int, int]] = []
    kernel = triton_kernels.attend_tiles

    class Counted:
        def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
            def launch(*args: Any, **constants: Any) -> None:
                launched.append((constants["KIND"], grid[1]))
                kernel[grid](*args, **constants)

            return launch

    monkeypatch.setattr(triton_ops, "attend_tiles", Counted())
    requests = {DECODE: [Request(1, 300)], SHORT: [Request(2, 300)], WHOLE: [Request(20, 200)]}[kind]
    case = make_case(SMALL, requests, {}, torch.float32, padding=0)
    check(case, run(case))
    assert launched == [(kind, {DECODE: 2, SHORT: 2, WHOLE: 3}[kind])]


def test_static_rows_hold_one_step_after_the_other() -> None:
    """The same buffers and grids for every step, fewer rows than there is room for, contexts of one part or many."""
    static = StaticRows.decode(9, 50, 16, "cpu")
    table = static.tiles(9, 16, (1, 1)).table
    for mix in ("decode", "empty", "long"):
        requests = [r for r in MIXES[mix] if r.queries == 1]
        case = make_case(SMALL, requests, OPTIONS["sinks"], torch.float32, padding=9 - len(requests))
        static.fill(case.rows)
        got = run(case, static)
        assert torch.equal(got, run(case))
        check(case, got)
    assert static.tiles(9, 16, (8, 8)).table is table


def test_a_decode_launch_of_fewer_programs_than_items() -> None:
    case = make_case(SMALL, [Request(1, 256), Request(1, 700), Request(1, 3)], {}, torch.float32)
    path = TritonAttention("cpu", torch.float32)
    expected = case.run(path)
    path._most = 4
    assert torch.equal(case.run(path), expected)


@pytest.mark.parametrize("kind", [SHORT, WHOLE])
def test_a_grid_of_fewer_programs_than_items(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a prefill with more tiles than a grid's second axis may have programs."""
    shape = triton_shapes.Shape(kind, 8, 4, 128, 128, 16, torch.bfloat16)
    assert shape.programs_of(200_000, 8)[1] == 65_535
    assert shape.programs_of(7, 8)[1] == 7
    case = make_case(SMALL, MIXES["everything"], OPTIONS["all"], torch.float32)
    whole = run(case)
    monkeypatch.setattr(triton_shapes, "MOST_ITEMS", 2)
    assert torch.equal(run(case), whole)


def test_static_rows_say_what_does_not_fit() -> None:
    static = StaticRows.decode(2, 4, 16, "cpu")
    with pytest.raises(ValueError, match="expected rows of one query"):
        static.fill(AttentionRows.build([2], [2], [[0]]))
    static.fill(AttentionRows.build([1, 1], [1, 1], [[0], [0]]))
    with pytest.raises(ValueError, match="at most 2 rows"):
        static.fill(AttentionRows.build([1, 1, 1], [1, 1, 1], [[0], [1], [2]]))
    with pytest.raises(ValueError, match="numbers"):
        static.fill(AttentionRows.build([1, 1], [400, 400], [list(range(25)), list(range(25, 50))]))
    with pytest.raises(ValueError, match="expected 2 tokens and blocks of 16, got 3 and 16"):
        static.tiles(3, 16, (1, 1))
    with pytest.raises(RuntimeError, match="tiles"):
        _ = static.table


def test_counters_grow_and_old_ones_stay() -> None:
    path = TritonAttention("cpu", torch.float32)
    first = path._enough(10)
    more = path._enough(first.numel() + 1)
    assert more.numel() > first.numel()
    assert path._counters[0] is first
    assert path._enough(5) is more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("widths", [(3, 8, 6), (5, 80, 80), (2, 63, 60), (70, 64, 64)], ids=str)
def test_written_keys_are_where_they_belong(widths: tuple[int, int, int], dtype: torch.dtype) -> None:
    heads, key_dim, value_dim = widths
    fused = torch.randn(6, heads * (key_dim + value_dim)).to(dtype)
    k = fused[:, : heads * key_dim].view(6, heads, key_dim)
    v = fused[:, heads * key_dim :].view(6, heads, value_dim)
    k_cache = torch.full((4, 4, heads, key_dim), 7.0).to(dtype)
    v_cache = torch.full((4, 4, heads, value_dim), 7.0).to(dtype)
    slots = torch.tensor([15, 0, -1, 7, 8, 3])
    TritonAttention("cpu", dtype).write_kv(k, v, k_cache, v_cache, slots)
    written = slots >= 0
    assert torch.equal(k_cache.view(16, heads, key_dim)[slots[written]], k[written])
    assert torch.equal(v_cache.view(16, heads, value_dim)[slots[written]], v[written])
    others = torch.ones(16, dtype=torch.bool)
    others[slots[written]] = False
    assert bool((k_cache.view(16, -1)[others] == 7).all())
    assert bool((v_cache.view(16, -1)[others] == 7).all())


def test_heads_may_stand_apart_when_written() -> None:
    """As transformers hands them over: [Hkv, T, D] seen as [T, Hkv, D]."""
    k, v = (torch.randn(3, 5, 16).transpose(0, 1) for _ in range(2))
    k_cache, v_cache = torch.zeros(2, 4, 3, 16), torch.zeros(2, 4, 3, 16)
    TritonAttention("cpu", torch.float32).write_kv(k, v, k_cache, v_cache, torch.arange(5))
    assert torch.equal(k_cache.flatten(0, 1)[:5], k)
    assert torch.equal(v_cache.flatten(0, 1)[:5], v)


def test_operators_describe_themselves() -> None:
    case = make_case(SMALL, FEW, {}, torch.float32)
    tiles = case.rows.tiles(case.q.shape[0], 16, (8, 8))
    launches = [n for launch in tiles.launches for n in (launch.items, launch.partials, launch.first)]
    counters = torch.zeros(1000, dtype=torch.int32)
    layer = (case.q, case.k_cache, case.v_cache, None, tiles.table, counters, launches, 64, 0.1, 0, 0.0)
    assert written(triton_ops.paged_attention, layer) == set(), "the counters end as they began"
    kept = (torch.randn(3, 2, 32), torch.randn(3, 2, 32), case.k_cache, case.v_cache, torch.arange(3))
    assert written(triton_ops.write_kv, kept) == {"k_cache", "v_cache"}


def test_says_what_is_wrong() -> None:
    case = make_case(SMALL, FEW, {}, torch.float32, padding=0)
    path = TritonAttention("cpu", torch.float32)
    q, k, v, rows = case.q, case.k_cache, case.v_cache, case.rows
    with pytest.raises(ValueError, match=r"expected torch\.float32, got torch\.bfloat16"):
        path.attend(q.bfloat16(), k, v, rows, scale=1.0)
    with pytest.raises(ValueError, match="H a multiple of Hkv"):
        path.attend(q[:, :3], k, v, rows, scale=1.0)
    with pytest.raises(ValueError, match=f"T >= {len(q)}"):
        path.attend(q[1:], k, v, rows, scale=1.0)
    with pytest.raises(ValueError, match="expected contiguous caches"):
        path.attend(q, k.transpose(0, 1).contiguous().transpose(0, 1), v, rows, scale=1.0)
    wide = torch.zeros(1, 16, 1, 513)
    with pytest.raises(ValueError, match="at most 512 elements"):
        path.attend(torch.zeros(1, 1, 513), wide, wide, AttentionRows.build([1], [1], [[0]]), scale=1.0)
    with pytest.raises(ValueError, match="int64 slots"):
        path.write_kv(k[0], v[0], k, v, torch.zeros(16, dtype=torch.int32))
    with pytest.raises(ValueError, match="slots that fit"):
        path.write_kv(k[0], v[0], k, v, torch.zeros(15, dtype=torch.int64))
