"""Linear layers by torch: its own product, and oneDNN's with weights in blocks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from peftmux.kernels.dense.columns import Columns


class PlainDense:
    """torch's own product."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self._weight, self._bias)

    def weight(self) -> Tensor:
        return self._weight

    def columns(self, start: int, stop: int) -> PlainDense:
        return PlainDense(self._weight[start:stop], None if self._bias is None else self._bias[start:stop])


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

    def columns(self, start: int, stop: int) -> Columns:
        return Columns(self, start, stop)
