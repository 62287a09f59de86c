"""Row-wise operators: the definitions, computed in float32 and rounded once. Other forms are tested against them."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, 2019, arXiv 1910.07467).

    x: [..., D], weight: [D] -> [..., D].
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, stream: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(stream + x, its rms_norm): the end of one residual branch and the start of the next. x, stream: [..., D]."""
    total = (stream.float() + x.float()).to(x.dtype)
    return total, rms_norm(total, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020, arXiv 2002.05202). gate_up: [..., 2 I], the gate first -> [..., I]."""
    gate, up = gate_up.float().chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x in place: RoPE (Su et al., 2021, arXiv 2104.09864) on halves, of the first R elements of each head.

    x: [T, H, D], cos and sin: [T, R], R <= D even. Returns x.
    """
    turned = cos.shape[-1]
    x[..., :turned] = rotated(x[..., :turned], cos.unsqueeze(1), sin.unsqueeze(1))
    return x


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x1, x2) -> (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2), where 1 and 2 are the first and second half of R.

    x: [..., R], cos and sin: [..., R] that broadcast to it. Differentiable.
    """
    first, second = x.float().chunk(2, -1)
    return (x.float() * cos.float() + torch.cat([-second, first], -1) * sin.float()).to(x.dtype)
