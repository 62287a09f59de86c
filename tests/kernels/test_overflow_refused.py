"""Finite float32 values that the base's dtype cannot hold are refused by every kind of site, and by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftmux.adapters.errors import AdapterInvalid
from peftmux.adapters.lower import load_adapter
from peftmux.kernels.bottleneck import Bottleneck
from peftmux.kernels.bottleneck.site import BranchSite
from peftmux.kernels.embedding import EmbeddingPart
from peftmux.kernels.embedding.site import EmbeddingSite
from peftmux.kernels.experts import ExpertsPart, ExpertsSite
from peftmux.kernels.lowrank import LinearPart, LowRankSite
from peftmux.kernels.norms import NormPart
from peftmux.kernels.norms.site import NormSite
from peftmux.kernels.placed import checked, placed
from peftmux.kernels.routed import RoutedPart, RoutedSite
from peftmux.kernels.rows import ReplacedRows
from peftmux.kernels.rows.site import RowsSite
from peftmux.kernels.tree import mapped
from peftmux.kernels.virtual import VirtualRows, VirtualSite
from peftmux.runtime.engine.placement import prepare
from peftmux.runtime.model.load import load_model

FIXTURES = Path(__file__).parents[1] / "fixtures"
CPU, HALF = torch.device("cpu"), torch.float16
HUGE = 1e6
"""Above the largest float16, 65504."""


def big(*shape: int) -> Tensor:
    return torch.full(shape, HUGE)


def ordinary(*shape: int) -> Tensor:
    return torch.ones(shape)


BRANCH = Bottleneck(ordinary(2, 4), ordinary(2), ordinary(4, 2), ordinary(4), ordinary(1), "relu")
PARTS: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "rows": (lambda: RowsSite(HALF, CPU), ReplacedRows(big(2, 4), torch.tensor([0, 1]), None), "replaced rows"),
    "rows' bias": (lambda: RowsSite(HALF, CPU), ReplacedRows(ordinary(2, 4), None, big(2)), "bias of replaced rows"),
    "norm": (lambda: NormSite(nn.LayerNorm(4).half(), 0), NormPart(big(4)), "norm"),
    "norm's bias": (lambda: NormSite(nn.LayerNorm(4).half(), 0), NormPart(None, big(4)), "norm"),
    "routed": (
        lambda: RoutedSite(4, [3], HALF, CPU).slice(0),
        RoutedPart(ordinary(2, 4), big(3, 2), (1, 1), 0),
        "expert",
    ),
    "experts": (lambda: ExpertsSite(2, 4, 3, HALF, CPU), ExpertsPart(big(2, 1, 4), ordinary(2, 3, 1), 1.0), "expert"),
    "virtual": (lambda: VirtualSite(HALF, CPU), VirtualRows(big(1, 4)), "virtual tokens"),
    "bottleneck": (lambda: BranchSite(HALF, CPU, print), replace(BRANCH, up_bias=big(4)), "bottleneck"),
    "embedding": (lambda: EmbeddingSite(CPU, 1e34), EmbeddingPart(rows=big(3, 4)), "embedding"),
}


@pytest.mark.parametrize("kind", PARTS)
def test_every_site_says_what_overflows(kind: str) -> None:
    site, part, what = PARTS[kind]
    with pytest.raises(ValueError, match=f"expected finite values, got inf or nan in .*{what}.* as torch"):
        site().prepare(part)
    site().prepare(mapped(part, lambda t: t.clamp(max=1.0) if t.is_floating_point() else t))


@pytest.mark.parametrize("name", ["a", "b"])
def test_low_rank_factors(name: str) -> None:
    site, part = LowRankSite(4, [3], HALF), LinearPart(a=ordinary(2, 4), b=ordinary(3, 2), scale=1.0)
    site.prepare([part])
    with pytest.raises(ValueError, match=f"inf or nan in {name} as torch.float16"):
        site.prepare([replace(part, **{name: getattr(part, name) * HUGE})])


def test_a_prefix_that_overflows_the_cache_is_refused() -> None:
    model = load_model(str(FIXTURES / "base" / "llama"), device=CPU, dtype=HALF)
    lowered = load_adapter(FIXTURES / "peft" / "llama" / "prefix", model)
    assert prepare(model, lowered, 4).stored is not None
    prefix = lowered.parts.prefix
    assert prefix is not None
    broken = replace(prefix, values=(*prefix.values[:-1], prefix.values[-1] + HUGE))
    with pytest.raises(AdapterInvalid, match="keys and values as torch") as refusal:
        prepare(model, replace(lowered, parts=replace(lowered.parts, prefix=broken)), 4)
    assert refusal.value.reason == "NOT_FINITE"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, HALF], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_value_anywhere_is_found(dtype: torch.dtype, value: float) -> None:
    for size in (1, 7, 33, 70):
        plain = torch.linspace(-3, 3, size).to(dtype)
        assert checked(plain, "it") is plain
        for at in range(size):
            broken = plain.clone()
            broken[at] = value
            with pytest.raises(ValueError, match=f"in it as {dtype}"):
                checked(broken, "it")
    large = torch.zeros(300_001, dtype=dtype)
    large[-2] = value
    with pytest.raises(ValueError, match="in it"):
        checked(large, "it")


def test_what_is_placed_is_contiguous_and_may_be_empty() -> None:
    given = torch.arange(6.0, requires_grad=True).view(2, 3).t()
    there = placed(given, CPU, HALF, "it")
    assert there.is_contiguous()
    assert not there.requires_grad
    assert there.tolist() == given.tolist()
    assert placed(torch.zeros(0, 4), CPU, HALF, "it").shape == (0, 4)
