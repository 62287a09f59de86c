"""Mixture-of-experts blocks of the base with adapters on their stacked weights, and on their routers.

The base's own forward computes every token. Those whose adapter changes an expert or a router are computed once more,
with their own weights, over the base's result: the other tokens keep theirs to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peftmux.adapters.experts import ExpertWeights
from peftmux.kernels.agreement import agree, example
from peftmux.kernels.experts import ExpertsSite, Group, Pairs, RouterPart, routed_weight
from peftmux.kernels.placed import placed
from peftmux.runtime.model.step import StepState

_TOKENS = 7


class ExpertsForward:
    """Stands for the `forward` of one module of stacked experts, in the form that transformers gives all of them.

    `up` holds the adapters of gate_up_proj (or up_proj), `down` those of down_proj.
    """

    def __init__(self, module: nn.Module, weights: ExpertWeights, step: StepState) -> None:
        self._module: Any = module
        self._base: Callable[..., Tensor] = module.forward
        self._step = step
        self._transposed = weights.transposed
        up = weights.up
        self.up, self.down = (
            ExpertsSite(w.experts, w.in_features, w.out_features, p.dtype, p.device)
            for w, p in ((up, weights.up_weight), (weights.down, weights.down_weight))
        )
        self._up_weight, self._down_weight = weights.up_weight, weights.down_weight
        self._up_bias, self._down_bias = weights.up_bias, weights.down_bias

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x: [T, D], experts and weights: [T, k] -> [T, D]."""
        out = self._base(x, experts, weights)
        if not (self.up.empty and self.down.empty):
            self._adapt(out, x, experts, weights)
        return out

    def _adapt(self, out: Tensor, x: Tensor, experts: Tensor, weights: Tensor) -> None:
        segments = self._step.inputs.segments
        adapted = tuple([slot for slot in segments.slots if slot in self.up or slot in self.down])
        if adapted:
            tokens, slots = segments.tokens_of(adapted)
            out[tokens] = self.compute(x[tokens], experts[tokens], weights[tokens], slots).to(out.dtype)

    def compute(self, x: Tensor, experts: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
        """All of it for some tokens: x: [t, D], experts and weights: [t, k], slots: [t] -> [t, D]."""
        pairs = Pairs.of(experts, slots)
        groups, pair_x = pairs.groups, x[pairs.tokens]
        hidden = self._product(pair_x, groups, self._up_weight, self._up_bias)
        self.up.apply(hidden, pair_x, groups)
        hidden = self._module._apply_gate(hidden) if self._module.has_gate else self._module.act_fn(hidden)
        out = self._product(hidden, groups, self._down_weight, self._down_bias)
        self.down.apply(out, hidden, groups)
        return pairs.by_token(out * weights.flatten()[pairs.order].unsqueeze(1))

    def _product(self, x: Tensor, groups: list[Group], weight: Tensor, bias: Tensor | None) -> Tensor:
        """The experts' own linear layers. x: [P, in] in the groups' order -> [P, out]."""
        pieces = []
        for expert, _, start, end in groups:
            w = weight[expert].t() if self._transposed else weight[expert]
            pieces.append(linear(x[start:end], w, None if bias is None else bias[expert]))
        return torch.cat(pieces)


class RouterSite:
    """The adapters of one router: for each, the router with its own weight."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        self._weight = weight.detach()
        self._held: dict[int, PreparedRouter] = {}

    @property
    def empty(self) -> bool:
        return not self._held

    def __contains__(self, slot: int) -> bool:
        return slot in self._held

    def prepare(self, part: RouterPart) -> PreparedRouter:
        weight = self._weight.float()
        on_device = RouterPart(part.a.to(weight.device), part.b.to(weight.device), part.scale)
        changed = placed(routed_weight(weight, on_device), weight.device, self._weight.dtype, "a router's weight")
        return PreparedRouter(_with_weight(self._module, changed), changed)

    def put(self, slot: int, prepared: PreparedRouter) -> None:
        self._held[slot] = prepared

    def drop(self, slot: int) -> None:
        self._held.pop(slot, None)

    def route(self, slot: int, x: Tensor) -> Any:
        return self._held[slot].module(x)


@dataclass(frozen=True, slots=True, eq=False)
class PreparedRouter:
    """A router of one adapter; everything but its weight is the base's."""

    module: nn.Module
    weight: Tensor

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


class RouterForward:
    """Stands for the `forward` of one router, whose results are tensors with a row for each token."""

    def __init__(self, module: nn.Module, step: StepState) -> None:
        self._base: Callable[[Tensor], Any] = module.forward
        self._step = step
        self.site = RouterSite(module)

    def __call__(self, x: Tensor) -> Any:
        out = self._base(x)
        if not self.site.empty:
            flat = x.reshape(-1, x.shape[-1])
            for slot, start, end in self._step.inputs.segments.runs:
                if slot in self.site:
                    changed_rows = _tensors(self.site.route(slot, flat[start:end]))
                    for whole, changed in zip(_tensors(out), changed_rows, strict=True):
                        whole.view(-1, whole.shape[-1])[start:end] = changed.view(-1, whole.shape[-1])
        return out


@torch.inference_mode()
def experts_forward(module: nn.Module, weights: ExpertWeights, step: StepState) -> ExpertsForward | None:
    """The module's stand-in where its experts are reproduced on random input, else None."""
    try:
        forward = ExpertsForward(module, weights, step)
        x = example(weights.up_weight, (_TOKENS, weights.up.in_features))
        first = torch.arange(_TOKENS, device=x.device)
        experts = torch.stack([first, first + 1], 1) % weights.up.experts
        shares = example(weights.up_weight, (_TOKENS, 2)).softmax(-1)
        expected = module.forward(x, experts, shares)
        got = forward.compute(x, experts, shares, torch.zeros(_TOKENS, dtype=torch.int64, device=x.device))
    except (RuntimeError, TypeError, AttributeError, IndexError):
        return None
    return forward if agree(got, expected) else None


@torch.inference_mode()
def router_forward(module: nn.Module, step: StepState) -> RouterForward | None:
    """The router's stand-in where it answers token by token from its weight, else None."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    x = example(weight, (_TOKENS, weight.shape[1]))
    try:
        whole, part = _tensors(module(x)), _tensors(module(x[2:4]))
        other = _tensors(_with_weight(module, weight.detach().flip(0) + 1)(x))
    except (RuntimeError, TypeError, AttributeError):
        return None
    by_token = all(w.dim() == 2 and len(w) == _TOKENS and agree(p, w[2:4]) for w, p in zip(whole, part, strict=True))
    reads_it = any(not torch.equal(a, b) for a, b in zip(whole, other, strict=True))
    return RouterForward(module, step) if by_token and reads_it else None


def _with_weight(module: nn.Module, weight: Tensor) -> nn.Module:
    """The same module with another weight; everything else is shared."""
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)
    twin._parameters = {**module._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    return twin


def _tensors(out: Any) -> tuple[Tensor, ...]:
    found = (out,) if isinstance(out, Tensor) else tuple(out)
    if not found or not all(isinstance(t, Tensor) for t in found):
        raise TypeError(f"expected tensors, got {type(out).__name__}")
    return found
