"""A linear layer: the definition. Other forms are tested against it."""

from __future__ import annotations

from torch import Tensor


def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W^T + b, in float32 and rounded once. x: [..., K], weight: [N, K], bias: [N] -> [..., N]."""
    y = x.float() @ weight.float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)
