"""The base model's own linear layers, laid out for the device they run on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear


class Dense(Protocol):
    """y = x W^T + b over one weight, or over several that read the same input, stacked."""

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., sum of outs]."""
        ...

    def weight(self) -> Tensor:
        """The stacked weight, [sum of outs, in]."""
        ...


class PlainDense:
    """torch's own product."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self._weight, self._bias)

    def weight(self) -> Tensor:
        return self._weight


class PackedDense:
    """oneDNN's blocked weight layout, chosen for steps of `_TOKENS` tokens: two to five times torch's own speed."""

    _TOKENS = 32

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), self._TOKENS)
        self._bias = bias
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self._product(x, self._packed, self._bias, "none", [], "")
        return out

    def weight(self) -> Tensor:
        out: Tensor = self._packed.to_dense()
        return out


def choose_dense(device: torch.device, dtype: torch.dtype) -> type[PlainDense] | type[PackedDense]:
    """PackedDense where these private operators exist and give the right product here, else PlainDense."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return PlainDense
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 32, generator=generator).to(dtype)
    x, bias = torch.randn(5, 32, generator=generator).to(dtype), torch.randn(48, generator=generator).to(dtype)
    try:
        packed = PackedDense(weight, bias)
        close = torch.allclose(packed(x).float(), linear(x, weight, bias).float(), rtol=2e-2, atol=2e-2)
        same = torch.equal(packed.weight(), weight)
    except (RuntimeError, AttributeError, TypeError):
        return PlainDense
    return PackedDense if close and same else PlainDense


def stack(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Weights [out_i, in] below each other; a bias that only some have is zero for the others."""
    weight = weights[0] if len(weights) == 1 else torch.cat(tuple(weights))
    if all(b is None for b in biases):
        return weight, None
    parts = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    return weight, parts[0] if len(parts) == 1 else torch.cat(parts)
