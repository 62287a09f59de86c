"""Linear layers whose weights torchao keeps in 8-bit floating point, with a scale for each output row.

Source: FP8 formats for deep learning (Micikevicius et al., 2022, arXiv 2209.05433); torchao's Float8WeightOnlyConfig.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Float8Linear(nn.Linear):
    """torchao's weight, unrounded inputs: made by `adopt_float8` of the nn.Linear that torchao leaves in its place.

    A type of its own, because what stacks or reads weights of plain layers by their type must not take this for one.
    """

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def dequantised(self) -> Tensor:
        """[out, in] in the base's dtype: what the product takes. A new tensor."""
        weight: Any = self.weight
        values: Tensor = weight.dequantize()
        return values


class _Product(torch.autograd.Function):
    """x W^T. Backward makes W once more: the dequantised weights of all layers, kept for it, would be a whole base."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Float8Linear) -> Tensor:
        ctx.layer = layer
        return torch.matmul(x, layer.dequantised().T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return torch.matmul(gradient, ctx.layer.dequantised().to(gradient.dtype)), None


def adopt_float8(module: nn.Module) -> None:
    """Give every linear layer that torchao left with a weight-only float8 weight its own type."""
    for layer in module.modules():
        if type(layer) is nn.Linear and _is_weight_only(layer.weight):
            layer.__class__ = Float8Linear


def keep_out_of_broadcasts(module: nn.Module) -> None:
    """To be called of the module that is trained by several processes, with whatever wraps its layers in place.

    Data-parallel training begins with one process sending its weights to the others. torchao's tensors cannot be sent,
    and every process has read the same ones from the checkpoint.
    """
    names = [f"{name}.weight" for name, layer in module.named_modules() if isinstance(layer, Float8Linear)]
    if names:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def _is_weight_only(weight: object) -> bool:
    """Not those that round inputs too: torchao does it by the largest value of a token or of the whole batch."""
    kind = type(weight)
    return (
        kind.__module__.split(".")[0] == "torchao"
        and kind.__name__ == "Float8Tensor"
        and getattr(weight, "act_quant_kwargs", None) is None
    )
