"""Feed-forward blocks of the base, found by what they compute: linear layers with an activation between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.pytorch_utils import Conv1D

from peftmux.adapters.base import FeedForwardSite
from peftmux.kernels.agreement import agree, example, widened

_FORMS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")


@dataclass(frozen=True, slots=True)
class FeedForward:
    """outer(activate([inner(x) for each inner projection])), in eval mode."""

    inner: tuple[str, ...]
    outer: str
    activate: Callable[[Sequence[Tensor]], Tensor]

    def site(self, path: str) -> FeedForwardSite:
        return FeedForwardSite(path, self.inner, self.outer)


@torch.no_grad()
def feed_forward(module: nn.Module) -> FeedForward | None:
    """The module as such a block, if it computes one on random input; None if not."""
    children = dict(module.named_children())
    for inner, outer in _FORMS:
        layers = [children.get(name) for name in (*inner, outer)]
        if not all(type(layer) in (nn.Linear, Conv1D) for layer in layers):
            continue
        act = next((found for name in _ACTIVATIONS if callable(found := getattr(module, name, None))), silu)
        others = [child for name, child in children.items() if name not in (*inner, outer) and child is not act]
        if not all(isinstance(child, nn.Dropout | nn.Identity) for child in others):
            continue
        block = FeedForward(inner, outer, _activation(act, len(inner), layers))
        return block if _computes(module, block) else None
    return None


def _activation(act: Any, inner: int, layers: Sequence[nn.Module | None]) -> Callable[[Sequence[Tensor]], Tensor]:
    if inner == 2:
        return lambda own: act(own[0]) * own[1]
    if _width(layers[0], out=True) == 2 * _width(layers[1], out=False):

        def packed(own: Sequence[Tensor]) -> Tensor:
            gate, up = own[0].chunk(2, -1)
            both: Tensor = act(gate) * up
            return both

        return packed
    return lambda own: act(own[0])


def _width(layer: Any, out: bool) -> int:
    rows, columns = layer.weight.shape
    return int(columns if out == isinstance(layer, Conv1D) else rows)


def _computes(module: Any, block: FeedForward) -> bool:
    first = getattr(module, block.inner[0])
    x = example(first.weight, (3, _width(first, out=False)))
    x = widened(x, first(x))
    training = module.training
    module.eval()
    try:
        expected = module(x)
        got = getattr(module, block.outer)(block.activate([getattr(module, name)(x) for name in block.inner]))
    except (RuntimeError, TypeError, IndexError):
        return False
    finally:
        module.train(training)
    return isinstance(expected, Tensor) and agree(got, expected)
