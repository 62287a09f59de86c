"""Faster forms of common layers, and the checks that tell where they are the same function."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from peftmux.runtime.model.sites import SiteGroup

_CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class FastRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, 2019), rounded once."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        weight = norm.weight
        assert isinstance(weight, nn.Parameter)
        self.weight = weight
        self._shape = tuple(weight.shape)
        self._eps = _eps(norm)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self._shape, self.weight, self._eps)


class FastSwiGLU:
    """down(silu(gate x) * up x) with gate and up in one product. Stands for the feed-forward module's `forward`."""

    def __init__(self, gate_up: SiteGroup, parent: nn.Module) -> None:
        self._gate_up = gate_up
        self._parent = parent  # read late: its down projection is swapped after this is made
        self._half = gate_up.sizes[0]

    def __call__(self, x: Tensor) -> Tensor:
        h = self._gate_up(x)
        product = silu(h[..., : self._half]).mul_(h[..., self._half :])
        out: Tensor = self._parent.down_proj(product)  # type: ignore[operator]
        return out


def _eps(norm: nn.Module) -> float | None:
    eps = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None)
    return eps if isinstance(eps, float) else None


@torch.inference_mode()
def is_rms_norm(module: nn.Module) -> bool:
    """Is this a norm by name whose output is FastRMSNorm's?"""
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith("RMSNorm") and isinstance(weight, nn.Parameter) and weight.dim() == 1
    if not named or _eps(module) is None or not isinstance(weight, nn.Parameter):
        return False
    x = _random(weight, (3, weight.shape[0]))
    return _equal(module(x), FastRMSNorm(module)(x))


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
    x = _random(gate.weight, (3, gate.in_features))
    return _equal(module(x), down(silu(gate(x)) * up(x)))


def _random(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def _equal(a: Tensor, b: Tensor) -> bool:
    tolerance = _CLOSE.get(a.dtype, 0.0) * max(1.0, float(a.abs().max()))
    return a.shape == b.shape and bool((a.float() - b.float()).abs().max() <= tolerance)
