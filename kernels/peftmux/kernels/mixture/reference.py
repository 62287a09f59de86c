"""A mixture of low-rank variants of one feed-forward block. The one definition.

    y = sum over the k chosen e of  w_e ( W_d h_e + s B_de A_de h_e + b_d ),    h_e = act( W_i x + s B_ie A_ie x + b_i )

over the block's inner projections i (gate and up, or one), its outer projection d and its activation; w is the softmax
of R x, its k largest values, made to sum to 1. The router computes in float32, and the outer product is linear, so it
is done once:  y = W_d (sum w_e h_e) + b_d + sum w_e s B_de A_de h_e.

Source: MixLoRA (Li et al., 2024, arXiv 2404.15159), equations 4 to 8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftmux.kernels.experts import ExpertsPart, apply_experts_part


@dataclass(frozen=True, slots=True)
class MixturePart:
    """What one adapter makes of one feed-forward block.

    router: [E, D]; `experts` are the variants' low-rank factors by the name of the projection, for those that have any.
    """

    router: Tensor
    top_k: int
    experts: Mapping[str, ExpertsPart]

    @property
    def rank(self) -> int:
        return max((part.rank for part in self.experts.values()), default=0)


def route(x: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """x: [T, D] -> (shares [T, k] float32, the experts they belong to [T, k])."""
    return choose(all_shares(x, router), top_k)


def all_shares(x: Tensor, router: Tensor) -> Tensor:
    """Of every expert. x: [T, D] -> [T, E] float32."""
    return (x.float() @ router.float().t()).softmax(-1)


def choose(shares: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`route`, of the shares of all experts [T, E]."""
    kept, chosen = shares.topk(top_k, -1)
    return kept / kept.sum(-1, keepdim=True), chosen


def apply_mixture_part(
    x: Tensor,
    inner: Mapping[str, Tensor],
    activate: Callable[[Sequence[Tensor]], Tensor],
    outer: str,
    part: MixturePart,
) -> tuple[Tensor, Tensor | float]:
    """What the outer projection is to be given, and what is to be added to its output. Differentiable.

    x: [T, D], inner: the base's inner projections of x by name, in `activate`'s order -> ([T, I], [T, D]).
    """
    shares, chosen = route(x, part.router, part.top_k)
    hidden: Tensor | float = 0.0
    added: Tensor | float = 0.0
    for share, expert in zip(shares.unbind(1), chosen.unbind(1), strict=True):
        share = share.unsqueeze(1)
        own = [_changed(y, x, expert, part.experts.get(name)) for name, y in inner.items()]
        h = activate(own)
        hidden = hidden + share * h
        if outer in part.experts:
            zero = torch.zeros(len(x), part.experts[outer].b.shape[1], dtype=h.dtype, device=h.device)
            added = added + share * _changed(zero, h, expert, part.experts[outer])
    assert isinstance(hidden, Tensor)
    return hidden, added


def _changed(y: Tensor, x: Tensor, expert: Tensor, part: ExpertsPart | None) -> Tensor:
    return y if part is None else apply_experts_part(y, x, expert, part)
