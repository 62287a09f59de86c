"""Which form of the base's linear layers a model runs: decided once, when it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from peftmux.kernels import native
from peftmux.kernels.dense.native_path import NativeForm
from peftmux.kernels.dense.torch_path import PackedDense, PlainDense


class Dense(Protocol):
    """y = x W^T + b over one weight, or over several that read the same input, stacked."""

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., sum of outs]."""
        ...

    def weight(self) -> Tensor:
        """The stacked weight, [sum of outs, in]."""
        ...

    def columns(self, start: int, stop: int) -> Dense:
        """A layer of outputs start .. stop - 1 alone, over the same memory: [..., in] -> [..., stop - start]."""
        ...


DenseForm = Callable[[Tensor, Tensor | None], Dense]
"""Of a weight [N, K] and a bias [N] or None."""


def choose_dense(device: torch.device, dtype: torch.dtype) -> DenseForm:
    """Ours on matrix tiles, else oneDNN's where its private operators are there, else torch's own."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return PlainDense
    library = native.load()
    if library and (product := library.dense(dtype)):
        return NativeForm(product)
    return PackedDense if _right(PackedDense, dtype) else PlainDense


def _right(form: DenseForm, dtype: torch.dtype) -> bool:
    """Does this form exist here, give the right product, and give its weight back?"""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 32, generator=generator).to(dtype)
    x, bias = torch.randn(5, 32, generator=generator).to(dtype), torch.randn(48, generator=generator).to(dtype)
    try:
        made = form(weight, bias)
        close = torch.allclose(made(x).float(), linear(x, weight, bias).float(), rtol=2e-2, atol=2e-2)
        return close and torch.equal(made.weight(), weight)
    except (RuntimeError, AttributeError, TypeError):
        return False
