"""The gathered kernels on a CUDA device: numbers, untouched rows, graphs that outlive their adapters, gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from peftmux.kernels.lowrank import LinearPart, LowRankSite, Segments, apply_linear_part
from peftmux.kernels.lowrank.tiles import TileBuffer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Widths = tuple[int, tuple[int, ...]]
MODEL: Widths = (4096, (4096, 1024, 1024))
ODD: Widths = (63, (60, 130, 5))

# Ranks of the slices, experts of the first one, whether it has an epilogue.
KINDS: tuple[tuple[tuple[int, ...], int, bool], ...] = (
    ((16, 16, 16), 0, False),
    ((8, 8, 8), 0, True),
    ((64, 0, 64), 0, False),
    ((0, 0, 0), 0, True),
    ((24, 4, 0), 6, False),
    ((1, 128, 3), 0, True),
)

# (adapter of each row, tokens of each row)
MIXES: dict[str, tuple[Sequence[int], Sequence[int]]] = {
    "one": ([3], [1]),
    "distinct": ([1, 2, 3, 4, 5, 6, 0, 1], [1] * 8),
    "identical": ([5] * 63, [1] * 63),
    "zipf": ([1] * 30 + [2] * 15 + [3] * 8 + [0] * 4 + [4, 5, 6], [1] * 60),
    "base only": ([0, 0], [5, 1]),
    "empty": ([], []),
    "prefill": ([1, 0, 5, 2, 6, 3], [300, 60, 63, 1, 97, 130]),
}


def parts_of(slot: int, widths: Widths) -> list[LinearPart | None]:
    generator = torch.Generator().manual_seed(slot)
    ranks, experts, epilogue = KINDS[(slot - 1) % len(KINDS)]
    width, slices = widths

    def random(*shape: int, by: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * by

    return [
        LinearPart(
            a=random(rank, width, by=width**-0.5) if rank else None,
            b=random(out, rank, by=rank**-0.5) if rank else None,
            scale=0.5 + slot / 8,
            out_scale=random(out) if epilogue else None,
            bias=random(out) if epilogue else None,
            gate=random(experts, width, by=width**-0.5) if experts and i == 0 else None,
        )
        for i, (rank, out) in enumerate(zip(ranks, slices, strict=True))
    ]


def site_of(widths: Widths, dtype: torch.dtype, slots: Sequence[int]) -> LowRankSite:
    site = LowRankSite(*widths, dtype, "cuda")
    for slot in slots:
        site.put(slot, site.prepare(parts_of(slot, widths)))
    return site


def batch(tokens: int, widths: Widths, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """-> y, x with three rows of nan past the end."""
    generator = torch.Generator().manual_seed(tokens)
    y = torch.randn(tokens + 3, sum(widths[1]), generator=generator)
    x = torch.randn(tokens + 3, widths[0], generator=generator)
    y[tokens:], x[tokens:] = torch.nan, torch.nan
    return y.to("cuda", dtype), x.to("cuda", dtype)


def exact(y: Tensor, x: Tensor, segments: Segments, widths: Widths) -> tuple[Tensor, Tensor]:
    """-> (the definition in float64 with weights rounded to y's dtype, its terms' magnitudes)."""
    out, size = y.double(), y.double().abs()
    for slot, start, end in segments.runs:
        for part, target, terms in zip(
            parts_of(slot, widths), out[start:end].split(widths[1], 1), size[start:end].split(widths[1], 1), strict=True
        ):
            assert part is not None
            rounded = LinearPart(
                _double(part.a, y.dtype),
                _double(part.b, y.dtype),
                part.scale,
                _double(part.out_scale),
                _double(part.bias),
                _double(part.gate, y.dtype),
            )
            sizes = LinearPart(
                _size(rounded.a), _size(rounded.b), part.scale, _size(rounded.out_scale), _size(rounded.bias)
            )
            own = x[start:end].double()
            target.copy_(apply_linear_part(target, own, rounded))
            terms.copy_(apply_linear_part(terms, own.abs(), sizes))
    return out, size


def _double(tensor: Tensor | None, rounded: torch.dtype = torch.float32) -> Tensor | None:
    return None if tensor is None else tensor.to("cuda", rounded).double()


def _size(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.abs()


def bound(expected: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
    """As in the interpreter: 1e-6 of the terms' magnitudes; below float32 also a unit of rounding for t and for y.

    x and A of 4096 terms are summed in float32, in another order than float64's.
    """
    error = 1e-6 * size
    return error if dtype is torch.float32 else error + torch.finfo(dtype).eps / 2 * (expected.abs() + size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("widths", [MODEL, ODD], ids=["model", "odd"])
def test_every_mix(widths: Widths, dtype: torch.dtype) -> None:
    site = site_of(widths, dtype, range(1, 7))
    assert site.path == "triton"
    for mix, rows in MIXES.items():
        segments = Segments.build(*rows, "cuda")
        count = segments.num_tokens
        y, x = batch(count, widths, dtype)
        expected, size = exact(y, x, segments, widths)
        results = []
        for _ in range(5):
            got = y.clone()
            site.apply(got, x, segments)
            results.append(got[:count])
            assert bool(got[count:].isnan().all()), mix
        error = (results[0].double() - expected[:count]).abs()
        assert bool((error <= bound(expected[:count], size[:count], dtype)).all()), (mix, error.max())
        assert all(torch.equal(result, results[0]) for result in results), f"{mix}: the same bits every time"
        base = segments.slot_of_token == 0
        assert torch.equal(results[0][base], y[:count][base]), mix


@pytest.mark.parametrize("tokens", [8, 60, 300])
def test_a_row_does_not_depend_on_what_else_is_there(tokens: int) -> None:
    """Alone at its site, or among adapters of larger ranks and with gates: the same bits."""
    y, x = batch(tokens, MODEL, torch.bfloat16)
    results = []
    for slots, others in (([1], 0), ([1, 2, 3, 4, 6], 0), (range(1, 7), 6), (range(1, 7), 5)):
        site = site_of(MODEL, torch.bfloat16, slots)
        got = y.clone()
        site.apply(got, x, Segments.build([1, others, 1], [2, tokens - 5, 3], "cuda"))
        results.append(torch.cat([got[:2], got[tokens - 3 : tokens]]))
    assert all(torch.equal(result, results[0]) for result in results)


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@pytest.mark.parametrize("tokens", [8, 64])
def test_a_graph_serves_adapters_that_come_later(tokens: int) -> None:
    site = site_of(MODEL, torch.bfloat16, [1])
    buffer = TileBuffer(tokens, 16, "cuda")
    start, x = batch(tokens - 3, MODEL, torch.bfloat16)
    x = x.nan_to_num()
    start = start.nan_to_num()
    y = start.clone()
    graph = captured(lambda: site.apply(y, x, Segments.over(buffer, "cuda")))
    for put, drop, slots, lens in (
        ([], [], [1], [tokens]),
        ([3, 6], [], [3, 1, 6, 0], [1, 1, tokens - 3, 1]),
        ([5, 2], [1, 3], [5, 2, 3, 6], [2, tokens - 4, 1, 1]),
        ([], [2, 5, 6], [2, 6], [1, 1]),
        ([], [], [], []),
    ):
        for slot in put:
            site.put(slot, site.prepare(parts_of(slot, MODEL)))
        for slot in drop:
            site.drop(slot)
        segments = Segments.build(slots, lens, "cuda")
        buffer.fill(segments.runs)
        y.copy_(start)
        graph.replay()
        here = Segments(tuple(run for run in segments.runs if site.has(run[0])), tokens, segments.device, 1)
        expected, size = exact(start, x, here, MODEL)
        assert bool(((y.double() - expected).abs() <= bound(expected, size, torch.bfloat16)).all())
        assert torch.equal(y[here.slot_of_token == 0], start[here.slot_of_token == 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients(dtype: torch.dtype) -> None:
    from peftmux.kernels.lowrank.triton_grad import add_lowrank

    width, out = 1024, 512
    generator = torch.Generator().manual_seed(0)
    segments = Segments.build([1, 0, 2, 1, 3], [100, 7, 63, 5, 1], "cuda")
    count = segments.num_tokens

    def random(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        values: Tensor = torch.randn(*shape, generator=generator) / shape[1] ** 0.5
        return values.to("cuda", kind)

    parts = {
        slot: LinearPart(random(rank, width).requires_grad_(), random(out, rank).requires_grad_(), 2.0)
        for slot, rank in ((1, 8), (2, 64), (3, 16))
    }
    y, x = random(count, out, kind=dtype).requires_grad_(), random(count, width, kind=dtype).requires_grad_()
    weights = random(count, out, kind=dtype)
    leaves = [t for p in parts.values() for t in (p.a, p.b) if t is not None]
    got = torch.autograd.grad((add_lowrank(y, x, parts, segments) * weights).sum(), [y, x, *leaves])

    exact_leaves = [t.detach().to(dtype).double().requires_grad_() for t in leaves]
    exact_y, exact_x = (t.detach().double().requires_grad_() for t in (y, x))
    pieces = list(exact_y.split([100, 7, 63, 5, 1]))
    for piece, (slot, start, end) in zip((0, 2, 3, 4), segments.runs, strict=True):
        a, b = exact_leaves[2 * slot - 2 : 2 * slot]
        pieces[piece] = apply_linear_part(pieces[piece], exact_x[start:end], LinearPart(a, b, 2.0))
    total = (torch.cat(pieces) * weights.double()).sum()
    expected = torch.autograd.grad(total, [exact_y, exact_x, *exact_leaves])
    limit = 1e-5 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps
    for ours, theirs in zip(got, expected, strict=True):
        assert bool(((ours.double() - theirs).abs() <= limit * theirs.abs().max()).all())
    again = torch.autograd.grad((add_lowrank(y, x, parts, segments) * weights).sum(), [y, x, *leaves])
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
