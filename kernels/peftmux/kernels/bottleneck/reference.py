"""What bottleneck adapters do to a residual branch (attention or feed-forward). The one definition.

A branch reads the residual stream h and gives y; the base goes on with h + y. With adapters it goes on with h + y':

    bottleneck   y' = y + A(z),    A(z) = scale * (U act(D z + d) + u),    z = y, y + h or h;   z, A(z) may be normed
    fusion       y' = y + sum_i p_i V A_i(z),    p = softmax_i(q(z) . k(A_i(z)))        (no 1 / sqrt(d))

Source: Houlsby et al., 2019, arXiv 1902.00751 (z = y); Pfeiffer et al., 2020, arXiv 2005.00247 (z = y + h, and the
fusion); He et al., 2021, arXiv 2110.04366 (z = h, scaled). What is read, and where, as AdapterHub's library has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "elu": functional.elu,
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "leakyrelu": functional.leaky_relu,
    "linear": lambda x: x,
    "relu": torch.relu,
    "relu6": functional.relu6,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}
"""By AdapterHub's names."""

Reads = Literal["branch", "sum", "residual"]
"""What z is: the branch's output y, y + h, or the residual stream h."""


EPSILON = 1e-5
"""Of torch's LayerNorm."""


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """weight, bias: [D]."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """down: [m, D], down_bias: [m], up: [D, m], up_bias: [D]; scale: [D] or [1]. `norms` are of z and of A(z)."""

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    scale: Tensor
    activation: str
    reads: Reads = "branch"
    norms: tuple[LayerNorm | None, LayerNorm | None] = (None, None)

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True, slots=True)
class Fusion:
    """query, key, value: [D, D]; biases [D], value has none. `query` reads what the bottlenecks read."""

    bottlenecks: tuple[Bottleneck, ...]
    query: Tensor
    query_bias: Tensor
    key: Tensor
    key_bias: Tensor
    value: Tensor

    @property
    def rank(self) -> int:
        return max(part.rank for part in self.bottlenecks)


def apply_bottleneck(y: Tensor, h: Tensor, part: Bottleneck) -> Tensor:
    """The definition above, differentiable. y, h: [T, D] -> [T, D] in y's dtype, computed in the part's."""
    return (y + _update(_read(y, h, part).to(part.down.dtype), part)).to(y.dtype)


def apply_fusion(y: Tensor, h: Tensor, part: Fusion) -> Tensor:
    """The definition above, differentiable. y, h: [T, D] -> [T, D] in y's dtype, computed in the part's."""
    z = _read(y, h, part.bottlenecks[0]).to(part.query.dtype)
    updates = torch.stack([_update(z, one) for one in part.bottlenecks], dim=1)  # [T, N, D]
    query = functional.linear(z, part.query, part.query_bias).unsqueeze(1)
    keys = functional.linear(updates, part.key, part.key_bias)
    weights = (query * keys).sum(-1, keepdim=True).softmax(1)
    return (y + (weights * functional.linear(updates, part.value)).sum(1)).to(y.dtype)


def _read(y: Tensor, h: Tensor, part: Bottleneck) -> Tensor:
    if part.reads == "sum":
        return y + h
    return y if part.reads == "branch" else h


def _update(z: Tensor, part: Bottleneck) -> Tensor:
    """[T, D]: A(z)."""
    before, after = part.norms
    inner = ACTIVATIONS[part.activation](functional.linear(_normed(z, before), part.down, part.down_bias))
    return _normed(part.scale * functional.linear(inner, part.up, part.up_bias), after)


def _normed(x: Tensor, norm: LayerNorm | None) -> Tensor:
    return x if norm is None else functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, EPSILON)
