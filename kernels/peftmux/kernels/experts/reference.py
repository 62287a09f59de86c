"""LoRA on the weights of a base that is itself a mixture of experts. The one definition.

    experts   y'[p] = y[p] + scale * B_e (A_e x[p]),   e the expert that pair p of a token and an expert goes to
    router    W' = W + scale * B A

Source: LoRA (Hu et al., 2021, arXiv 2106.09685), for each expert on its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExpertsPart:
    """What one adapter does to one stacked weight of E experts. a: [E, r, in], b: [E, out, r]."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[1]


@dataclass(frozen=True, slots=True)
class RouterPart:
    """What one adapter does to a router's weight [E, in]. a: [r, in], b: [E, r]."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def apply_experts_part(y: Tensor, x: Tensor, experts: Tensor, part: ExpertsPart) -> Tensor:
    """The definition above, differentiable. y: [P, out], x: [P, in], experts: [P] int64 -> [P, out] in y's dtype."""
    t = torch.einsum("pri,pi->pr", part.a[experts], x.to(part.a.dtype))
    return (y + part.scale * torch.einsum("por,pr->po", part.b[experts], t)).to(y.dtype)


def routed_weight(weight: Tensor, part: RouterPart) -> Tensor:
    """The router's weight with the adapter, in the weight's dtype."""
    return (weight + part.scale * (part.b @ part.a)).to(weight.dtype)
