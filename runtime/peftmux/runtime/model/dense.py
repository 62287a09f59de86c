"""Linear layers that read the same input, as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peftmux.adapters.quantised import dequantised
from peftmux.kernels.dense import Columns, Dense


def stack(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Weights [out_i, in] below each other; a bias that only some have is zero for the others."""
    weight = weights[0] if len(weights) == 1 else torch.cat(tuple(weights))
    if all(b is None for b in biases):
        return weight, None
    parts = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    return weight, parts[0] if len(parts) == 1 else torch.cat(parts)


class QuantisedDense:
    """A layer that keeps its weight in few bits, as the base's product of one site."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._layer(x)
        return y

    def weight(self) -> Tensor:
        """[out, in] float32, made anew."""
        return dequantised(self._layer)

    def columns(self, start: int, stop: int) -> Dense:
        return Columns(self, start, stop)
