"""Replaced weight rows against the layer with those rows, alone and in a batch of several adapters."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from peftmux.kernels.lowrank import Segments
from peftmux.kernels.rows import ReplacedRows, RowsSite, apply_replaced_rows

OUT, IN = 19, 7
CPU = torch.device("cpu")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


WEIGHT, BIAS = random(OUT, IN), random(OUT)
IDS = torch.tensor([18, 0, 7])
PARTS = {
    "some": ReplacedRows(random(3, IN), IDS),
    "some and bias": ReplacedRows(random(3, IN), IDS, random(3)),
    "all": ReplacedRows(random(OUT, IN)),
    "all and bias": ReplacedRows(random(OUT, IN), bias=random(OUT)),
}


def replaced(x: torch.Tensor, part: ReplacedRows) -> torch.Tensor:
    """The layer with the part's rows in its own weight and bias."""
    rows = slice(None) if part.ids is None else part.ids
    weight, bias = WEIGHT.clone(), BIAS.clone()
    weight[rows] = part.values
    bias[rows] = 0.0 if part.bias is None else part.bias
    return linear(x, weight, bias)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("count", [0, 1, 63])
def test_the_layer_with_new_rows(name, count):
    x = random(count, IN)
    y = linear(x, WEIGHT, BIAS)
    kept = y.clone()
    out = apply_replaced_rows(y, x, PARTS[name])
    torch.testing.assert_close(out, replaced(x, PARTS[name]), atol=1e-5, rtol=1e-5)
    assert torch.equal(y, kept), "the definition changes nothing in place"


def test_only_a_slots_own_tokens_change():
    site = RowsSite(torch.float32, CPU)
    assert site.empty
    for slot, part in enumerate(PARTS.values(), start=1):
        site.put(slot, site.prepare(part))
    slots, lens = [0, 3, 1, 0, 2, 4, 9], [2, 3, 1, 4, 5, 2, 3]
    x = random(sum(lens), IN)
    y = linear(x, WEIGHT, BIAS)
    expected = y.clone()
    for slot, start in zip(slots, torch.tensor([0, *lens]).cumsum(0).tolist(), strict=False):
        if 1 <= slot <= len(PARTS):
            rows = slice(start, start + lens[slots.index(slot)])
            expected[rows] = replaced(x[rows], list(PARTS.values())[slot - 1])
    site.apply(y, x, Segments.build(slots, lens, CPU))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_half_precision_parts_take_the_sites_dtype():
    site = RowsSite(torch.bfloat16, CPU)
    prepared = site.prepare(PARTS["some and bias"])
    assert prepared.nbytes == 3 * IN * 2 + 3 * 8 + 3 * 2
    site.put(1, prepared)
    x = random(4, IN).bfloat16()
    y = torch.zeros(4, OUT, dtype=torch.bfloat16)
    site.apply(y, x, Segments.build([1], [4], CPU))
    assert y.count_nonzero() == 12
    torch.testing.assert_close(y.float(), replaced(x.float(), PARTS["some and bias"]) * (y != 0), atol=5e-2, rtol=2e-2)
    site.drop(1)
    assert site.empty
