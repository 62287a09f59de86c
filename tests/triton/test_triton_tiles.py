"""Operators that take one tile of an adapter's tokens a program: sparse changes, replaced rows, bottlenecks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from peftmux.kernels.bottleneck import (
    ACTIVATIONS,
    Bottleneck,
    Fusion,
    LayerNorm,
    apply_bottleneck,
    apply_fusion,
)
from peftmux.kernels.bottleneck import triton_path as bottleneck
from peftmux.kernels.lowrank import Segments
from peftmux.kernels.rows import ReplacedRows, apply_replaced_rows
from peftmux.kernels.rows import triton_path as rows
from peftmux.kernels.sparse import SparsePart, apply_sparse_part
from peftmux.kernels.sparse import triton_path as sparse
from tests.triton.mixes import MIXES, close, owners, segments
from tests.triton.operators import written

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PADDING = 2
"""Rows after the last token."""
IN, OUT = 60, 43


def widened(part: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The same part, its values rounded to the dtype, then in float64."""
    changed: dict[str, Any] = {}
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Tensor) and value.is_floating_point():
            changed[field.name] = value.to(dtype).double()
        elif isinstance(value, tuple):
            changed[field.name] = tuple(None if one is None else widened(one, dtype) for one in value)
    return replace(part, **changed)


def check(
    site: Any,
    parts: dict[int, Any],
    mix: str,
    dtype: torch.dtype,
    expected: Callable[[Tensor, Tensor, Any], Tensor],
    width: int = IN,
    slack: float = 16,
) -> None:
    """Rows of a larger tensor, its other columns NaN; x is NaN where nothing may be read."""
    step = STEPS[mix]
    slots = [0] * step.num_tokens
    for slot, start, end in step.runs:
        slots[start:end] = [slot] * (end - start)
    torch.manual_seed(0)
    x = torch.randn(len(slots) + PADDING, width).to(dtype)
    for row, slot in enumerate([*slots, *[0] * PADDING]):
        if slot not in parts:
            x[row] = float("nan")
    outputs = torch.full((len(x), OUT + 8), float("nan"), dtype=dtype)
    y = outputs[:, 5 : 5 + OUT]
    y.copy_(torch.randn(y.shape))
    before, again = outputs.clone(), outputs.clone()
    site.apply(y, x, step)
    site.apply(again[:, 5 : 5 + OUT], x, step)
    assert torch.equal(outputs.view(torch.uint8), again.view(torch.uint8)), "repeatable to the bit"
    old = before[:, 5 : 5 + OUT]
    for row, slot in enumerate([*slots, *[0] * PADDING]):
        if slot in parts:
            wide = old[row : row + 1].double(), x[row : row + 1].double()
            close(y[row], expected(*wide, parts[slot])[0], slack)
        else:
            assert torch.equal(y[row], old[row])
    assert outputs[:, :5].isnan().all()
    assert outputs[:, 5 + OUT :].isnan().all()


STEPS: dict[str, Segments] = {
    **{mix: segments(mix) for mix in MIXES},
    "tiles of 16": Segments.build([2, 0, 1, 3], [31, 2, 4, 3]),
    "tiles of 64": Segments.build([2, 0, 1, 3], [70, 180, 4, 3]),
}


def sparse_parts() -> dict[int, SparsePart]:
    """A tenth of all entries; one full row; nothing but the last entry."""
    torch.manual_seed(3)
    scattered = (torch.rand(OUT, IN) < 0.1).nonzero().t()
    full = torch.stack([torch.full((IN,), 7), torch.arange(IN)])
    last = torch.tensor([[OUT - 1], [IN - 1]])
    return {s: SparsePart(i, torch.randn(i.shape[1])) for s, i in ((1, scattered), (2, full), (3, last))}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mix", STEPS)
def test_sparse_changes(mix: str, dtype: torch.dtype) -> None:
    parts = sparse_parts()
    site = sparse.TritonSparseSite(IN, OUT, CPU)
    for slot, part in parts.items():
        site.put(slot, site.prepare(part))
    check(
        site,
        parts,
        mix,
        dtype,
        lambda y, x, part: apply_sparse_part(y, x, widened(part)),
    )


def rows_parts() -> dict[int, ReplacedRows]:
    """Three rows, all rows, and 17 of them with a bias."""
    torch.manual_seed(4)
    return {
        1: ReplacedRows(torch.randn(3, IN), torch.tensor([41, 0, 7])),
        2: ReplacedRows(torch.randn(OUT, IN), None, torch.randn(OUT)),
        3: ReplacedRows(torch.randn(17, IN), torch.randperm(OUT)[:17], torch.randn(17)),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mix", STEPS)
def test_replaced_rows(mix: str, dtype: torch.dtype) -> None:
    parts = rows_parts()
    site = rows.TritonRowsSite(dtype, CPU)
    for slot, part in parts.items():
        site.put(slot, site.prepare(part))

    def expected(y: Tensor, x: Tensor, part: ReplacedRows) -> Tensor:
        return apply_replaced_rows(y, x, widened(part, dtype))

    check(site, parts, mix, dtype, expected)


def bottleneck_part(
    inner: int, activation: str, reads: str, normed: bool = False, one_scale: bool = True
) -> Bottleneck:
    norm = LayerNorm(torch.randn(OUT), torch.randn(OUT)) if normed else None
    return Bottleneck(
        torch.randn(inner, OUT) / 4,
        torch.randn(inner),
        torch.randn(OUT, inner) / 4,
        torch.randn(OUT),
        torch.tensor([0.7]) if one_scale else torch.randn(OUT),
        activation,
        reads,  # type: ignore[arg-type]
        (norm, None),
    )


def through(y: Tensor, h: Tensor, part: Bottleneck, dtype: torch.dtype) -> Tensor:
    """The definition in float64, with the two roundings that the kernels make on the way: of what is read, and of the
    inner values. (What follows is rounded once.)"""
    part = widened(part, dtype)
    z = {"branch": y, "sum": (y + h).to(dtype).double(), "residual": h}[part.reads]
    if part.norms[0] is not None:
        norm = part.norms[0]
        z = torch.nn.functional.layer_norm(z, z.shape[-1:], norm.weight, norm.bias, 1e-5).to(dtype).double()
    inner = ACTIVATIONS[part.activation](z @ part.down.t() + part.down_bias).to(dtype).double()
    return y + part.scale * (inner @ part.up.t() + part.up_bias)


@pytest.mark.parametrize("mix", STEPS)
def test_bottlenecks_are_the_definition(mix: str) -> None:
    """float32, where the definition itself is the expectation: Houlsby's, Pfeiffer's normed, the parallel one."""
    torch.manual_seed(5)
    parts = {
        1: bottleneck_part(5, "swish", "branch"),
        2: bottleneck_part(33, "relu", "sum", normed=True),
        3: bottleneck_part(16, "gelu_new", "residual", one_scale=False),
    }
    site = bottleneck.TritonBranchSite(torch.float32, CPU, lambda held: None)
    for slot, part in parts.items():
        site.put(slot, site.prepare(part))
    assert site.graphed
    check(site, parts, mix, torch.float32, lambda y, h, p: apply_bottleneck(y, h, widened(p)), width=OUT, slack=64)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_bottlenecks_in_16_bits(dtype: torch.dtype) -> None:
    """Inner values may be rounded the other way than in float64: each moves y by half a unit of its own, 2^-9 or 2^-12
    of 2, times a weight of 1/4; a handful of the 33 do."""
    torch.manual_seed(5)
    parts = {1: bottleneck_part(5, "relu", "sum", normed=True), 2: bottleneck_part(33, "silu", "branch")}
    site = bottleneck.TritonBranchSite(dtype, CPU, lambda held: None)
    for slot, part in parts.items():
        site.put(slot, site.prepare(part))
    slack = 1e6 * 2**-9 * (1 if dtype is torch.bfloat16 else 1 / 8)
    for mix in ("zipf", "half base"):
        check(site, parts, mix, dtype, lambda y, h, p: through(y, h, p, dtype), width=OUT, slack=slack)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    """Also where its exponentials would cancel or overflow."""
    inputs = torch.tensor([0.0, 1e-6, -1e-6, 1e-3, -0.05, 0.3, -2.5, 6.5, 40.0, -90.0, 1e4, -1e4])
    width = len(inputs)
    eye, zero = torch.eye(width), torch.zeros(width)
    part = Bottleneck(eye, zero, eye, zero, torch.ones(1), activation, "residual")
    site = bottleneck.TritonBranchSite(torch.float32, CPU, lambda held: None)
    site.put(1, site.prepare(part))
    y = torch.zeros(1, width)
    site.apply(y, inputs[None].clone(), Segments.build([1], [1]))
    torch.testing.assert_close(y[0].double(), ACTIVATIONS[activation](inputs.double()), rtol=1e-6, atol=1e-7)


def test_what_the_kernels_do_not_compute_runs_by_the_definition() -> None:
    """A fusion, and a bottleneck whose update is normed, beside one that the kernels take; no graph serves them."""
    torch.manual_seed(6)
    ends = LayerNorm(torch.randn(OUT), torch.randn(OUT))
    plain = [bottleneck_part(4, "relu", "branch") for _ in range(2)]
    square = [torch.randn(OUT, OUT) / 6 for _ in range(3)]
    fusion = Fusion((plain[0], plain[1]), square[0], torch.randn(OUT), square[1], torch.randn(OUT), square[2])
    parts: dict[int, Any] = {1: replace(plain[0], norms=(None, ends)), 2: fusion, 3: plain[1]}
    site = bottleneck.TritonBranchSite(torch.float32, CPU, lambda held: None)
    for slot, part in parts.items():
        site.put(slot, site.prepare(part))

    def expected(y: Tensor, h: Tensor, part: Any) -> Tensor:
        apply = apply_fusion if isinstance(part, Fusion) else apply_bottleneck
        return apply(y, h, widened(part))

    check(site, parts, "zipf", torch.float32, expected, width=OUT, slack=256)
    assert not site.graphed
    site.drop(1)
    site.drop(2)
    assert site.graphed


def test_a_dropped_adapter_leaves_its_tokens_alone() -> None:
    parts = rows_parts()
    site = rows.TritonRowsSite(torch.float32, CPU)
    for slot, part in parts.items():
        site.put(slot, site.prepare(part))
    site.drop(1)
    del parts[1]
    check(site, parts, "zipf", torch.float32, lambda y, x, part: apply_replaced_rows(y, x, widened(part)))
    assert len(owners("zipf")) == 9


def test_operators_can_be_traced_without_running() -> None:
    sites: tuple[Any, ...] = (
        sparse.TritonSparseSite(IN, OUT, CPU),
        rows.TritonRowsSite(torch.float32, CPU),
        bottleneck.TritonBranchSite(torch.float32, CPU, lambda held: None),
    )
    parts = sparse_parts()[1], rows_parts()[1], bottleneck_part(5, "relu", "sum")
    for site, part in zip(sites, parts, strict=True):
        site.put(1, site.prepare(part))
    step = segments("zipf")
    x, h, y = (torch.randn(step.num_tokens, width) for width in (IN, OUT, OUT))
    tiles = (step.tiles.tiles, step.tiles.order)
    tables = [(site._table.tensor, step.tiles.block_m) for site in sites]
    assert written(sparse.add_sparse_, (y, x, *tiles, *tables[0])) == {"y"}
    assert written(rows.replace_rows_, (y, x, *tiles, *tables[1])) == {"y"}
    assert written(bottleneck.bottlenecks_, (y, h, step.token_slots, *tiles, *tables[2], 16)) == {"y"}
