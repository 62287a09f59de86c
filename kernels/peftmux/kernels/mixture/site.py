"""The adapters that make mixtures of one feed-forward block. Tokens are grouped by expert, so weights are read once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftmux.kernels.experts import ExpertsSite, Pairs
from peftmux.kernels.experts.site import PreparedExperts
from peftmux.kernels.lowrank import Segments
from peftmux.kernels.mixture.reference import MixturePart, route


@dataclass(frozen=True, slots=True, eq=False)
class PreparedMixture:
    """A part on its device, the router in float32: owned by the site once put."""

    router: Tensor
    top_k: int
    experts: Mapping[str, PreparedExperts]

    @property
    def nbytes(self) -> int:
        return self.router.nbytes + sum(prepared.nbytes for prepared in self.experts.values())


@dataclass(frozen=True, slots=True)
class BlockShape:
    """A feed-forward block: (in, out) of its inner projections, in the activation's order, and of the outer one."""

    inner: Mapping[str, tuple[int, int]]
    outer: str
    outer_shape: tuple[int, int]


class MixtureSite:
    """`prepare` may run in any thread; everything else belongs to the thread that runs the model."""

    def __init__(
        self,
        shape: BlockShape,
        activate: Callable[[Sequence[Tensor]], Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._shape = shape
        self._activate = activate
        self._dtype = dtype
        self._device = device
        self._held: dict[int, tuple[PreparedMixture, dict[str, ExpertsSite]]] = {}

    @property
    def empty(self) -> bool:
        return not self._held

    def prepare(self, part: MixturePart) -> PreparedMixture:
        """ValueError for wrong shapes, and for values that are not finite in the base's dtype."""
        experts = len(part.router)
        sites = self._sites(experts)
        if part.router.shape[1] != next(iter(self._shape.inner.values()))[0] or not 1 <= part.top_k <= experts:
            raise ValueError(f"expected a router of this block and 1 to {experts} experts a token, got {part.top_k}")
        prepared = {name: sites[name].prepare(own) for name, own in part.experts.items()}
        return PreparedMixture(part.router.to(self._device, torch.float32).contiguous(), part.top_k, prepared)

    def put(self, slot: int, prepared: PreparedMixture) -> None:
        sites = {name: site for name, site in self._sites(len(prepared.router)).items() if name in prepared.experts}
        for name, site in sites.items():
            site.put(slot, prepared.experts[name])
        self._held[slot] = (prepared, sites)

    def drop(self, slot: int) -> None:
        self._held.pop(slot, None)

    def mix(
        self, x: Tensor, inner: Sequence[Tensor], hidden: Tensor, segments: Segments
    ) -> list[tuple[int, int, Tensor]]:
        """Write the mixtures' activations into `hidden`, in place.

        x: [T, D], inner: the base's inner projections [T, n], hidden: [T, I] -> (start, end, what is to be added to the
        outer projection of these tokens).
        """
        added = []
        for slot, start, end in segments.runs:
            if slot in self._held:
                own = [y[start:end] for y in inner]
                hidden[start:end], terms = self._mix_run(slot, x[start:end], own)
                if terms is not None:
                    added.append((start, end, terms))
        return added

    def _mix_run(self, slot: int, x: Tensor, inner: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        prepared, sites = self._held[slot]
        shares, chosen = route(x, prepared.router, prepared.top_k)
        pairs = Pairs.of(chosen, slot)
        tokens, groups = pairs.tokens, pairs.groups
        pair_x = x[tokens]
        own = [y[tokens] for y in inner]
        for name, y in zip(self._shape.inner, own, strict=True):
            if name in sites:
                sites[name].apply(y, pair_x, groups)
        h = self._activate(own)
        weights = shares.flatten()[pairs.order].unsqueeze(1)
        mixed = pairs.by_token(h * weights).to(x.dtype)
        outer = sites.get(self._shape.outer)
        if outer is None:
            return mixed, None
        terms = h.new_zeros(len(h), outer.out_features)
        outer.apply(terms, h, groups)
        return mixed, pairs.by_token(terms * weights).to(x.dtype)

    def _sites(self, experts: int) -> dict[str, ExpertsSite]:
        shapes = {**self._shape.inner, self._shape.outer: self._shape.outer_shape}
        return {
            name: ExpertsSite(experts, inside, out, self._dtype, self._device) for name, (inside, out) in shapes.items()
        }
