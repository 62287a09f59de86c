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

from peftmux.kernels.elementwise import ElementwisePath, rotate_

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


class Rotation:
    """transformers' `apply_rotary_pos_emb`, turning queries and keys in place by `kernels.elementwise.rotate_`."""

    def __init__(self, path: ElementwisePath) -> None:
        self._rotate_ = path.rotate_

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        """q: [1, H, T, D] (or [1, T, H, D] with unsqueeze_dim 2), k alike, cos and sin: [1, T, R] of equal halves."""
        heads_last = unsqueeze_dim == 2
        return self._turn(q, cos[0], sin[0], heads_last), self._turn(k, cos[0], sin[0], heads_last)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor, heads_last: bool) -> Tensor:
        if 0 in x.stride():  # one head seen as many: it would turn many times
            x = x.contiguous()
        self._rotate_(x[0] if heads_last else x[0].transpose(0, 1), cos, sin)
        return x


class PairRotation(Rotation):
    """The same, queries and keys in one launch."""

    def __init__(self, path: ElementwisePath) -> None:
        super().__init__(path)
        assert path.rotate_pair_ is not None
        self._rotate_pair_ = path.rotate_pair_

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        q, k = (x.contiguous() if 0 in x.stride() else x for x in (q, k))
        first, second = (x[0] if unsqueeze_dim == 2 else x[0].transpose(0, 1) for x in (q, k))
        self._rotate_pair_(first, second, cos[0], sin[0])
        return q, k


def swap_rotary(model: PreTrainedModel, path: ElementwisePath) -> None:
    """Let attention modules whose rotation is the one above call it. Touches these instances only, no global."""
    rotation = PairRotation(path) if path.rotate_pair_ else Rotation(path)
    forwards: dict[type, FunctionType | None] = {}
    for module in model.modules():
        if _ROTATE in _names(module):
            cls = type(module)
            if cls not in forwards:
                forwards[cls] = _rebound(cls, rotation)
            forward = forwards[cls]
            if forward is not None:
                module.forward = MethodType(forward, module)


def _names(module: nn.Module) -> tuple[str, ...]:
    code = getattr(type(module).forward, "__code__", None)
    return code.co_names if code else ()


def _rebound(cls: type[nn.Module], rotation: Rotation) -> FunctionType | None:
    """cls.forward with its own rotation replaced, or None where that is another function."""
    forward = cls.forward
    original = getattr(sys.modules[cls.__module__], _ROTATE, None)
    if original is None or not _same_rotation(original) or forward.__closure__:
        return None
    names = {**forward.__globals__, _ROTATE: _of_one_dtype(rotation, original)}
    rebound = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__)
    rebound.__kwdefaults__ = forward.__kwdefaults__
    return rebound


def _of_one_dtype(rotation: Rotation, original: Callable[..., Any]) -> Callable[..., Any]:
    """Some keep their angles in float32 beside narrower queries: those turn as they did."""

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        turn = rotation if cos.dtype is q.dtype else original
        return turn(q, k, cos, sin, *rest, **named)

    return rotate


def _same_rotation(original: Callable[..., Any]) -> bool:
    """Does it turn halves as `rotate_` does? Interleaved kinds do not."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 3, 2, 8, generator=generator), torch.randn(1, 1, 2, 8, generator=generator)
    angle = torch.randn(1, 2, 4, generator=generator).repeat(1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    try:
        expected = original(q, k, cos, sin)
    except (RuntimeError, TypeError, ValueError):
        return False
    turned = (rotate_(x[0].transpose(0, 1).clone(), cos[0], sin[0]).transpose(0, 1) for x in (q, k))
    return all(torch.allclose(a, b[0], atol=1e-6) for a, b in zip(turned, expected, strict=True))
