"""Rotary embeddings: frequencies that do not depend on the batch, and a faster rotation.

Some kinds (longrope, dynamic NTK) choose frequencies from the largest position of the whole flat batch, so that one
long request would change its neighbours. They are pinned to the served context length when the model is loaded.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_ROTATE = "apply_rotary_pos_emb"


def pin_frequencies(model: nn.Module, context_length: int) -> None:
    """Settle every rotary embedding at the frequencies of a full context, then leave them."""
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        per_layer = types if isinstance(types, dict) else {None: types}
        if not any(isinstance(t, str) and ("dynamic" in t or t == "longrope") for t in per_layer.values()):
            continue
        last = torch.tensor([[context_length - 1]], device=next(model.parameters()).device)
        x = torch.zeros(1, device=last.device)
        for layer_type in per_layer:
            module(x, last, **({"layer_type": layer_type} if layer_type else {}))
        settled = inspect.unwrap(type(module).forward)
        module.forward = MethodType(settled, module)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """RoPE (Su et al., 2021, arXiv 2104.09864) on halves: [x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin].

    q: [1, H, T, D], k: [1, Hkv, T, D], cos and sin: [1, T, R] with their halves equal; only the first R of D turn.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _rotate_one(q, cos, sin), _rotate_one(k, cos, sin)


def _rotate_one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, half = cos.shape[-1], cos.shape[-1] // 2
    if turned == x.shape[-1]:
        y = x * cos
    else:
        y = x.clone()
        y[..., :turned] *= cos
    y[..., :half].addcmul_(x[..., half:turned], sin[..., :half], value=-1)
    y[..., half:turned].addcmul_(x[..., :half], sin[..., half:])
    return y


def swap_rotary(model: PreTrainedModel) -> None:
    """Let attention modules whose rotation is the one above call it. Touches these instances only, no global."""
    forwards: dict[type, FunctionType | None] = {}
    for module in model.modules():
        if _ROTATE in _names(module):
            cls = type(module)
            if cls not in forwards:
                forwards[cls] = _rebound(cls)
            forward = forwards[cls]
            if forward is not None:
                module.forward = MethodType(forward, module)


def _names(module: nn.Module) -> tuple[str, ...]:
    code = getattr(type(module).forward, "__code__", None)
    return code.co_names if code else ()


def _rebound(cls: type[nn.Module]) -> FunctionType | None:
    """cls.forward with its own rotation replaced, or None where that is another function."""
    forward = cls.forward
    original = getattr(sys.modules[cls.__module__], _ROTATE, None)
    if original is None or not _same_rotation(original) or forward.__closure__:
        return None
    rebound = FunctionType(
        forward.__code__, {**forward.__globals__, _ROTATE: rotate}, forward.__name__, forward.__defaults__
    )
    rebound.__kwdefaults__ = forward.__kwdefaults__
    return rebound


def _same_rotation(original: Callable[..., Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 3, 2, 8, generator=generator), torch.randn(1, 1, 2, 8, generator=generator)
    angle = torch.randn(1, 2, 4, generator=generator).repeat(1, 1, 2)
    try:
        expected = original(q, k, angle.cos(), angle.sin())
    except (RuntimeError, TypeError, ValueError):
        return False
    return all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(rotate(q, k, angle.cos(), angle.sin()), expected, strict=True)
    )
