"""What adapters do at linear layers: one part of the engine's, recomputed from trainable tensors at each call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from peftmux.adapters.quantised import dequantised, is_quantised
from peftmux.kernels.lowrank import LinearPart, apply_linear_part
from peftmux.trainer.host.host import Change


class LinearChange(Change, ABC):
    """y: [..., out], x: [..., in]. Subclasses say what the part is, and hold its trainable tensors."""

    low_rank_alone: ClassVar[bool] = False
    """The part has a, b and a scale, and nothing else."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.drop = drop

    @abstractmethod
    def part(self) -> LinearPart:
        """Made from the trainable tensors at each call, so that gradients reach them."""

    @property
    def draws(self) -> bool:
        return self.drop > 0 and self.training

    def low_rank(self) -> LinearPart | None:
        return self.part() if self.low_rank_alone else None

    def read(self, x: Tensor) -> Tensor:
        return dropout(x, self.drop) if self.draws else x

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        return _apply(y, self.read(x), self.part())


def _apply(y: Tensor, x: Tensor, part: LinearPart) -> Tensor:
    """`apply_linear_part`, with the low-rank term added in one pass over y where all of it has one dtype."""
    if part.a is None or part.b is None or not y.dtype == x.dtype == part.a.dtype:
        return apply_linear_part(y, x, part)
    hidden = linear(x, part.a).flatten(0, -2)
    added = torch.addmm(y.flatten(0, -2), hidden, part.b.T, alpha=part.scale).view_as(y)
    if part.out_scale is None and part.bias is None:
        return added
    return apply_linear_part(added, x, LinearPart(out_scale=part.out_scale, bias=part.bias))


def expert_notes(model: Any) -> tuple[str, ...]:
    """Says which weights an adapter of linear layers does not reach."""
    stacked = [name for name, p in model.named_parameters() if p.ndim == 3]
    if not stacked:
        return ()
    return (f"{len(stacked)} stacked expert weights, e.g. {stacked[0]}, are no linear layers: not adapted",)


def weight_out_in(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as [out, in]; transformers' Conv1D stores [in, out], a quantised layer codes."""
    if is_quantised(layer):
        return dequantised(layer)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight if isinstance(layer, nn.Linear) else weight.T


def fan_in_fan_out(layers: Iterable[nn.Module]) -> bool:
    """PEFT's field: whether the weights are stored [in, out]."""
    return not any(isinstance(layer, nn.Linear) for layer in layers)


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator, device: torch.device) -> nn.Parameter:
    """A float32 parameter drawn from U(-bound, bound) on the CPU, so that every device starts from the same values."""
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator).to(device))
