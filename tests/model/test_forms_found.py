"""What a base computes is recognised at any size of its weights and in any dtype, and nothing else is taken for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from peftmux.adapters.branches import residual_branches
from peftmux.adapters.feed_forward import feed_forward
from peftmux.runtime.errors import UnsupportedModel
from peftmux.runtime.model.fast import is_rms_norm, is_swiglu
from peftmux.runtime.model.load import fit_model
from peftmux.runtime.model.verify import reference_logits, verify
from tests.model.families import build

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = 0.003
"""Standard deviation of weights: what goes through a narrow block is then far below 1."""


def small(family: str, dtype: torch.dtype, **changes: Any) -> PreTrainedModel:
    return build(family, initializer_range=SMALL, **changes).to(dtype)  # type: ignore[no-any-return, arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "expected"), [("llama", True), ("gemma", False), ("gemma2", False)])
def test_gelu_is_not_taken_for_silu(family: str, expected: bool, dtype: torch.dtype) -> None:
    mlp = small(family, dtype).get_submodule("model.layers.0.mlp")
    assert is_swiglu(mlp) is expected
    block = feed_forward(mlp)
    assert block is not None
    assert block.outer == "down_proj"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_of_one_more_than_its_weight_is_another(dtype: torch.dtype) -> None:
    assert is_rms_norm(small("llama", dtype).get_submodule("model.norm"))
    assert not is_rms_norm(small("gemma", dtype).get_submodule("model.norm"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("family", "changes", "branches"),
    [
        ("llama", {}, 8),
        ("gpt2", {}, 8),
        ("olmo", {}, 8),
        ("granite", {"residual_multiplier": 0.22}, 0),
        ("granite", {"residual_multiplier": 1.0}, 8),
        ("olmo2", {}, 0),
        ("cohere2", {}, 0),
        ("gemma2", {}, 0),
        ("gemma3_text", {}, 0),
    ],
)
def test_branches_that_are_added_as_they_are(family: str, changes: Any, branches: int, dtype: torch.dtype) -> None:
    """Others are scaled, or normed, before they are added, or two are added at once."""
    assert len(residual_branches(small(family, dtype, **changes))) == branches


@pytest.mark.parametrize("family", ["olmo2", "gemma2", "gemma3_text", "granite"])
def test_families_load_in_bfloat16(family: str) -> None:
    """Loading compares with transformers' own numbers and tells others apart; OLMo 2 keeps its angles in float32."""
    module = build(family, initializer_range=0.02).to(torch.bfloat16)  # type: ignore[arg-type]
    numbers = reference_logits(module)
    model = fit_model(module, None, family)
    assert model.dtype is torch.bfloat16
    with pytest.raises(UnsupportedModel, match="cannot be served exactly"):
        verify(model, [logits.roll(1, 0) for logits in numbers])
