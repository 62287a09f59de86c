"""The low-rank term of many adapters and its gradients in torch, against autograd through the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftmux.kernels.lowrank import LinearPart, Segments, apply_linear_part, choose_training

WIDTH, OUT = 24, 20
ROWS = {
    "a run each": ([1, 2, 9], [3, 4, 1]),
    "some are nobody's": ([0, 2, 0, 1, 0], [2, 3, 1, 4, 2]),
    "one twice, one without a part": ([1, 2, 1, 3], [2, 2, 5, 3]),
}
RANKS = {1: 3, 2: 8, 4: 5, 9: 1}
"""4 has no token anywhere; 3 has tokens and no part."""


def leaves(dtype: torch.dtype, like: dict[int, LinearPart] | None = None) -> dict[int, LinearPart]:
    """Trainable factors, or the same values in another dtype."""
    generator = torch.Generator().manual_seed(5)
    made = {}
    for slot, rank in RANKS.items():
        a, b = torch.randn(rank, WIDTH, generator=generator), torch.randn(OUT, rank, generator=generator)
        if like is not None:
            old_a, old_b = like[slot].a, like[slot].b
            assert old_a is not None
            assert old_b is not None
            a, b = old_a.detach(), old_b.detach()
        made[slot] = LinearPart(a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_(), 0.5 * slot)
    return made


def by_rows(y: Tensor, x: Tensor, parts: dict[int, LinearPart], rows: tuple[list[int], list[int]]) -> Tensor:
    slots, lens = rows
    pieces = zip(slots, y.split(lens), x.split(lens), strict=True)
    return torch.cat([apply_linear_part(p, q, parts[slot]) if slot in parts else p for slot, p, q in pieces])


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(case: str, dtype: torch.dtype) -> None:
    rows = ROWS[case]
    segments = Segments.build(*rows)
    generator = torch.Generator().manual_seed(2)
    y, x, weights = (torch.randn(sum(rows[1]), n, generator=generator).to(dtype) for n in (OUT, WIDTH, OUT))
    parts = leaves(torch.float32)
    exact_parts = leaves(torch.float64, parts)
    exact_y, exact_x = y.double().requires_grad_(), x.double().requires_grad_()
    y.requires_grad_()
    x.requires_grad_()

    out = choose_training(x.device)(y, x, parts, segments)
    exact = by_rows(exact_y, exact_x, exact_parts, rows)
    assert out.dtype is dtype
    inputs = [t for slot in parts for t in (parts[slot].a, parts[slot].b) if t is not None]
    wanted = [t for slot in parts for t in (exact_parts[slot].a, exact_parts[slot].b) if t is not None]
    got = torch.autograd.grad((out.double() * weights.double()).sum(), [y, x, *inputs], allow_unused=True)
    expected = torch.autograd.grad((exact * weights.double()).sum(), [exact_y, exact_x, *wanted], allow_unused=True)
    bound = 1e-5 if dtype is torch.float32 else 2e-2
    for ours, theirs in zip([out, *got], [exact, *expected], strict=True):
        assert (ours is None) == (theirs is None), "adapter 4 has no gradient"
        if ours is not None and theirs is not None:
            assert bool(((ours.double() - theirs).abs() <= bound * (1 + theirs.abs())).all())
    nobodys = [i for i, slot in enumerate(segments.slot_of_token.tolist()) if slot not in parts]
    assert torch.equal(out[nobodys], y[nobodys])


def test_no_gradient_of_x_is_made_where_none_is_wanted() -> None:
    segments, parts = Segments.build([1], [4]), leaves(torch.float32)
    y, x = torch.ones(4, OUT), torch.ones(4, WIDTH)
    choose_training(x.device)(y, x, parts, segments).sum().backward()
    assert x.grad is None
    assert parts[1].a is not None
    assert parts[1].a.grad is not None


def test_what_it_does_not_compute_is_refused() -> None:
    segments, add = Segments.build([1], [2]), choose_training(torch.device("cpu"))
    y, x, a, b = torch.zeros(2, 5), torch.zeros(2, 7), torch.ones(3, 7), torch.ones(5, 3)
    with pytest.raises(ValueError, match="a, b and scale alone"):
        add(y, x, {1: LinearPart(a, b, bias=torch.ones(5))}, segments)
    assert add(y, x, {1: LinearPart()}, segments) is y
    assert add(y, x, {1: LinearPart(a, b)}, Segments.build([0], [2])) is y
