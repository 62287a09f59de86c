"""Gradients of the gathered kernels in Triton's interpreter, against autograd through the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftmux.kernels.lowrank import LinearPart, Segments, apply_linear_part
from peftmux.kernels.lowrank import triton_kernels as kernels
from peftmux.kernels.lowrank.triton_grad import add_lowrank
from tests.triton.lowrank_cases import Launches, _Recorded

RANKS = {1: 8, 2: 40, 4: 16, 9: 5}
"""Adapter 9 has no token in any batch; 3 is in some and has no part."""


def leaves(width: int, out: int, dtype: torch.dtype) -> dict[int, LinearPart]:
    generator = torch.Generator().manual_seed(7)

    def leaf(*shape: int) -> Tensor:
        values: Tensor = torch.randn(*shape, generator=generator) / shape[1] ** 0.5
        return values.to(dtype).requires_grad_()

    return {slot: LinearPart(leaf(rank, width), leaf(out, rank), 0.5 * slot) for slot, rank in RANKS.items()}


def gradients(out: Tensor, weights: Tensor, parts: dict[int, LinearPart], *more: Tensor) -> list[Tensor]:
    inputs = [t for part in parts.values() for t in (part.a, part.b) if t is not None]
    found = torch.autograd.grad((out * weights).sum(), [*inputs, *more], allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, [*inputs, *more], strict=True)]


def reference(y: Tensor, x: Tensor, parts: dict[int, LinearPart], segments: Segments) -> Tensor:
    pieces, at = [], 0
    for slot, start, end in segments.runs:
        pieces.append(y[at:start])
        own = slice(start, end)
        pieces.append(apply_linear_part(y[own], x[own], parts[slot]) if slot in parts else y[own])
        at = end
    return torch.cat([*pieces, y[at:]])


@pytest.mark.parametrize(
    ("widths", "rows"),
    [
        ((272, 80), ([1, 0, 2, 3, 1], [1, 1, 2, 1, 1])),
        ((272, 80), ([4, 0, 2, 1, 3, 2], [20, 3, 30, 9, 2, 1])),
        ((63, 60), ([2, 1, 0, 2], [1, 70, 1, 200])),
    ],
    ids=["rows", "tiles", "odd widths"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(widths: tuple[int, int], rows: tuple[list[int], list[int]], dtype: torch.dtype) -> None:
    segments = Segments.build(*rows)
    generator = torch.Generator().manual_seed(1)
    count = segments.num_tokens
    weights, y, x = (torch.randn(count, n, generator=generator).to(dtype) for n in (widths[1], widths[1], widths[0]))
    y.requires_grad_()
    x.requires_grad_()
    parts = leaves(*widths, torch.float32)
    out = add_lowrank(y, x, parts, segments)
    got = gradients(out, weights, parts, y, x)

    def exactly(tensor: Tensor | None) -> Tensor:
        assert tensor is not None
        return tensor.detach().to(dtype).double().requires_grad_()

    exact_parts = {slot: LinearPart(exactly(part.a), exactly(part.b), part.scale) for slot, part in parts.items()}
    exact_y, exact_x = y.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    expected_out = reference(exact_y, exact_x, exact_parts, segments)
    expected = gradients(expected_out, weights.double(), exact_parts, exact_y, exact_x)

    # One rounding of t or dt and one of the result, each a unit of rounding of what it sums.
    bound = 2e-6 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps
    for ours, exact in zip([out, *got], [expected_out, *expected], strict=True):
        assert bool(((ours.double() - exact).abs() <= bound * exact.abs().max()).all())
    without = [i for i, slot in enumerate(segments.slot_of_token.tolist()) if slot not in parts]
    assert torch.equal(out[without], y[without])
    assert not got[-1][without].any(), "x of a token without an adapter"
    assert got[0].dtype is torch.float32, "of the parameter, not of the batch"


def test_the_same_bits_and_these_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch)
    monkeypatch.setattr(kernels, "outer", _Recorded("outer", kernels.outer, launches))
    segments = Segments.build([1, 2], [2, 3])
    generator = torch.Generator().manual_seed(3)
    y, x = torch.randn(5, 48, generator=generator), torch.randn(5, 64, generator=generator).requires_grad_()
    parts = leaves(64, 48, torch.float32)
    weights = torch.randn(5, 48, generator=generator)
    first = gradients(add_lowrank(y, x, parts, segments), weights, parts, x)
    assert launches.names() == ["shrink", "expand"] * 2 + ["outer"] * 2
    again = gradients(add_lowrank(y, x, parts, segments), weights, parts, x)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_what_it_does_not_compute_is_refused() -> None:
    segments = Segments.build([1], [2])
    y, x = torch.zeros(2, 5), torch.zeros(2, 7)
    a, b = torch.ones(3, 7), torch.ones(5, 3)
    with pytest.raises(ValueError, match="a, b and scale alone"):
        add_lowrank(y, x, {1: LinearPart(a, b, bias=torch.ones(5))}, segments)
    with pytest.raises(ValueError, match=r"expected a \[r, 7\] and b \[5, r\], got \(3, 6\)"):
        add_lowrank(y, x, {1: LinearPart(a[:, :6], b)}, segments)
    assert add_lowrank(y, x, {1: LinearPart()}, segments) is y
    assert add_lowrank(y, x, {1: LinearPart(a, b)}, Segments.build([0], [2])) is y
