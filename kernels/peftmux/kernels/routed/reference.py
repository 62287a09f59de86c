"""Low-rank experts with shares from a first pass over the same tokens. The one definition.

    y'[t] = y[t] + sum_e g[t, l, e] * B_e A_e x[t],     g[t] = shares of the classifier's answer to h[t]

h is the base model's last hidden state, the classifier a perceptron with ReLU between its layers, l this site's place
among the sites that have experts.

Source: X-LoRA (Buehler and Buehler, 2024, arXiv 2402.07148), with the options that PEFT gives its shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True, slots=True)
class RoutedPart:
    """What one adapter does at one linear site. a: [R, in], b: [out, R], R the sum of `ranks`, one for each expert."""

    a: Tensor
    b: Tensor
    ranks: tuple[int, ...]
    """0 where an expert has nothing here."""
    layer: int
    """l above."""

    @property
    def rank(self) -> int:
        return max(self.ranks)


@dataclass(frozen=True, slots=True)
class ShareRule:
    """From the classifier's answer to shares: softmax of a / temperature, the k largest, softmax of what is not 0."""

    sites: int
    experts: int
    softmax: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    softmax_top_k: bool = False
    weight: float = 1.0
    """All shares are multiplied by it."""


def apply_routed_part(y: Tensor, x: Tensor, shares: Tensor, part: RoutedPart) -> Tensor:
    """The definition above, differentiable. y: [T, out], x: [T, in], shares: [T, sites, E] -> [T, out] in y's dtype."""
    counts = torch.tensor(part.ranks, device=x.device)
    t = linear(x.to(part.a.dtype), part.a) * shares[:, part.layer].repeat_interleave(counts, 1)
    return (y + linear(t, part.b)).to(y.dtype)


def shares_from(hidden: Tensor, layers: Sequence[tuple[Tensor, Tensor]], rule: ShareRule) -> Tensor:
    """hidden: [T, D], layers: the classifier's (weight, bias) -> shares [T, sites, E]."""
    h = hidden.to(layers[0][0].dtype)
    for weight, bias in layers[:-1]:
        h = linear(h, weight, bias).relu()
    logits = linear(h, *layers[-1])
    shares = logits.view(len(h), -1, rule.experts).expand(-1, rule.sites, -1)
    if rule.softmax:
        shares = (shares / rule.temperature).softmax(-1)
    if rule.top_k is not None:
        kept = torch.zeros_like(shares).scatter(-1, shares.topk(rule.top_k, -1).indices, 1.0)
        shares = shares * kept
    if rule.softmax_top_k:
        none = shares == 0
        shares = shares.masked_fill(none, float("-inf")).softmax(-1).masked_fill(none, 0.0)
    return shares * rule.weight
