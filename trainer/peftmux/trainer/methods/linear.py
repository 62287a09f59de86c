"""Adapters made of parts at linear sites: the module in a linear layer's place, and all of them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from peftmux.adapters.methods.lora import PREFIX
from peftmux.kernels.lowrank import LinearPart, apply_linear_part
from peftmux.trainer.methods.base import AttachedAdapter
from peftmux.trainer.sites import replace_module


class AdaptedLinear(nn.Module):
    """A frozen linear layer with one adapter's part, recomputed from the trainable tensors at each call.

    x: [..., in] -> [..., out], in the base layer's dtype. Subclasses say what the part is.
    """

    def __init__(self, base_layer: nn.Module, drop: float = 0.0) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.drop = drop

    def part(self) -> LinearPart:
        raise NotImplementedError

    def file_tensors(self) -> Mapping[str, nn.Parameter]:
        """The trainable tensors by their names in PEFT's file, after the module path."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        if self.drop and self.training:
            x = dropout(x, self.drop)
        return _apply(y, x, self.part())

    @property
    def weight(self) -> Tensor:
        """The base layer's own; some models look at its dtype or device."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]


class LinearAdapter(AttachedAdapter):
    """Modules of `build` in the places of `sites`; the rest of the model is frozen."""

    def __init__(
        self,
        kind: str,
        model: Any,
        sites: Mapping[str, nn.Module],
        build: Callable[[str, nn.Module], AdaptedLinear],
        fields: Mapping[str, object],
    ) -> None:
        self.kind = kind
        self.modules = {name: build(name, module) for name, module in sites.items()}
        stacked = [name for name, p in model.named_parameters() if p.ndim == 3]
        if stacked:
            self.notes = (
                f"{len(stacked)} stacked expert weights, e.g. {stacked[0]}, are no linear layers: not adapted",
            )
        self._model = model
        self._fields = dict(fields)
        model.requires_grad_(False)
        for name, module in self.modules.items():
            module.train(model.training)
            replace_module(model, name, module)
        self.parameters = {
            f"{PREFIX}{name}.{key}": parameter
            for name, module in self.modules.items()
            for key, parameter in module.file_tensors().items()
        }

    def peft_config(self) -> dict[str, object]:
        return dict(self._fields)

    def sites(self) -> Mapping[str, int]:
        return {name: sum(p.numel() for p in m.file_tensors().values()) for name, m in self.modules.items()}

    def detach(self) -> None:
        for name, module in self.modules.items():
            replace_module(self._model, name, module.base_layer)


def _apply(y: Tensor, x: Tensor, part: LinearPart) -> Tensor:
    """`apply_linear_part`, with the low-rank term added in one pass over y where all of it has one dtype."""
    if part.a is None or part.b is None or not y.dtype == x.dtype == part.a.dtype:
        return apply_linear_part(y, x, part)
    hidden = linear(x, part.a).flatten(0, -2)
    added = torch.addmm(y.flatten(0, -2), hidden, part.b.T, alpha=part.scale).view_as(y)
    if part.out_scale is None and part.bias is None:
        return added
    return apply_linear_part(added, x, LinearPart(out_scale=part.out_scale, bias=part.bias))


def weight_out_in(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as [out, in]; transformers' Conv1D stores [in, out]."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight if isinstance(layer, nn.Linear) else weight.T


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator, device: torch.device) -> nn.Parameter:
    """A float32 parameter drawn from U(-bound, bound) on the CPU, so that every device starts from the same values."""
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator).to(device))
