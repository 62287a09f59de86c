"""Which formula a norm of the base computes, found by trying it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftmux.kernels.agreement import ROUNDING, agree, example
from peftmux.kernels.norms.reference import NormPart, apply_norm_part


@dataclass(frozen=True, slots=True)
class Formula:
    """x -> (x - c) / sqrt(mean((x - c)^2) + eps) * (weight + offset) + bias, with c = mean(x) if `centred`, else 0."""

    eps: float
    centred: bool
    offset: float

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """In float32, rounded once. x: [..., D], weight, bias: [D]."""
        wide = x.float()
        if self.centred:
            wide = wide - wide.mean(-1, keepdim=True)
        out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * (weight.float() + self.offset)
        return (out if bias is None else out + bias.float()).to(x.dtype)


@torch.inference_mode()
def formula_of(norm: nn.Module) -> Formula | None:
    """None for a norm that computes something else, or whose parameters are not one weight and perhaps one bias."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.dtype not in ROUNDING:
        return None
    if bias is not None and (bias.shape != weight.shape or bias.dtype is not weight.dtype):
        return None
    shape = (3, weight.shape[0])
    trial = example(weight, shape)
    x = trial + 1  # a mean that is not zero tells whether the norm centres
    x[1] *= 1e-3  # where eps tells
    part = NormPart(trial[0], None if bias is None else trial[1])
    for name in ("variance_epsilon", "eps", "_eps"):
        eps = getattr(norm, name, None)
        if not isinstance(eps, float):
            continue
        for centred in (False, True):
            for offset in (0.0, 1.0):
                found = Formula(eps, centred, offset)
                if agree(apply_norm_part(norm, x, part), found(x, trial[0], part.bias)):
                    return found
    return None
