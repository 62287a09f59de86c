"""Faster forms of common layers, and the checks that tell where they are the same function."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from peftmux.kernels.agreement import agree, example, widened
from peftmux.kernels.elementwise import ElementwisePath, rms_norm
from peftmux.runtime.model.mixtures import Mixtures
from peftmux.runtime.model.sites import SiteGroup, SiteLinear, SwappedLayer


class FastRMSNorm(SwappedLayer):
    """`kernels.elementwise.rms_norm` with the weight of the norm it replaces."""

    def __init__(self, norm: nn.Module, path: ElementwisePath) -> None:
        super().__init__()
        weight, eps = norm.weight, _eps(norm)
        assert isinstance(weight, nn.Parameter)
        assert eps is not None
        self.weight = weight
        self._eps = eps
        self._norm = path.rms_norm

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x, self.weight, self._eps)


class FastSwiGLU:
    """down(silu(gate x) * up x) with gate and up in one product. Stands for the feed-forward module's `forward`."""

    def __init__(self, gate_up: SiteGroup, parent: nn.Module, path: ElementwisePath, mixtures: Mixtures) -> None:
        self._swiglu = path.swiglu
        self._gate_up = gate_up
        self._parent = parent  # read late: its down projection is swapped after this is made
        self._mixtures = mixtures

    def __call__(self, x: Tensor) -> Tensor:
        gate_up = self._gate_up(x)
        hidden = self._swiglu(gate_up)
        if not self._mixtures.site.empty:
            return self._mixtures.finish(x, gate_up.split(self._gate_up.sizes, -1), hidden)
        out: Tensor = self._parent.down_proj(hidden)  # type: ignore[operator]
        return out


class ScalingSwiGLU(FastSwiGLU):
    """The same, the scales of the down projection's inputs in the launch that makes them."""

    def __init__(self, gate_up: SiteGroup, parent: nn.Module, path: ElementwisePath, mixtures: Mixtures) -> None:
        super().__init__(gate_up, parent, path, mixtures)
        assert path.scaled_swiglu is not None
        self._scaled_swiglu = path.scaled_swiglu

    def __call__(self, x: Tensor) -> Tensor:
        down = self._parent.down_proj
        assert isinstance(down, SiteLinear), "the down projection was not swapped"
        scales = down.group.input_scales()
        if scales is None or not self._mixtures.site.empty:
            return super().__call__(x)
        return down.group(self._scaled_swiglu(self._gate_up(x), *scales), scaled=True)


def fast_swiglu(gate_up: SiteGroup, parent: nn.Module, path: ElementwisePath, mixtures: Mixtures) -> FastSwiGLU:
    """The form for this device."""
    form = ScalingSwiGLU if path.scaled_swiglu else FastSwiGLU
    return form(gate_up, parent, path, mixtures)


def _eps(norm: nn.Module) -> float | None:
    eps = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None)
    return eps if isinstance(eps, float) else None


@torch.inference_mode()
def is_rms_norm(module: nn.Module) -> bool:
    """Is this a norm by name that computes x / sqrt(mean(x^2) + eps) * weight?"""
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith("RMSNorm") and isinstance(weight, nn.Parameter) and weight.dim() == 1
    eps = _eps(module)
    if not named or eps is None or not isinstance(weight, nn.Parameter):
        return False
    x = example(weight, (3, weight.shape[0]))
    return agree(module(x), rms_norm(x, weight, eps))


@torch.inference_mode()
def is_swiglu(module: nn.Module) -> bool:
    """Is this a feed-forward module with gate_proj, up_proj and down_proj that computes down(silu(gate x) * up x)?"""
    if set(dict(module.named_children())) - {"gate_proj", "up_proj", "down_proj", "act_fn", "dropout"}:
        return False
    gate, up, down = (getattr(module, n, None) for n in ("gate_proj", "up_proj", "down_proj"))
    if not (isinstance(gate, nn.Linear) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear)):
        return False
    if gate.out_features != up.out_features or down.in_features != up.out_features:
        return False
    x = example(gate.weight, (3, gate.in_features))
    x = widened(x, linear(x, gate.weight))
    return agree(module(x), down(silu(gate(x)) * up(x)))
