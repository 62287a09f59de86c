"""A normalisation layer with other parameters than the base's. The one definition: the base's own forward with them.

So it is right for every norm, whatever it makes of its weight (Gemma's scales by 1 + weight).
Source: LN tuning (Qi et al., 2022, arXiv 2211.08682); biases: BitFit (Zaken et al., 2022, arXiv 2106.10199).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class NormPart:
    """weight: [D], bias: [D]; None keeps the base's."""

    weight: Tensor | None = None
    bias: Tensor | None = None


def apply_norm_part(norm: nn.Module, x: Tensor, part: NormPart) -> Tensor:
    """norm(x) with the part's values, in the dtype the parts have. x: [..., D] -> [..., D]."""
    given = {"weight": part.weight, "bias": part.bias}
    out: Tensor = torch.func.functional_call(norm, {n: t for n, t in given.items() if t is not None}, (x,))
    return out
