"""Linear layers of the base as adapter sites: one base product and one gathered low-rank call each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peftmux.adapters.base import LinearSite
from peftmux.kernels.dense import Dense
from peftmux.kernels.embedding import embedding_site
from peftmux.kernels.inputs import GatheredScales, InputScale, SliceInputSite, input_scale_site
from peftmux.kernels.lowrank import LowRankSite, Segments
from peftmux.kernels.norms import norm_site
from peftmux.kernels.routed import RoutedSite
from peftmux.kernels.rows import ReplacedRows, rows_site
from peftmux.kernels.sparse import SparsePart, sparse_site
from peftmux.runtime.model.step import StepState


class Site(Protocol):
    """What every kind of site offers (kernels' LowRankSite, RowsSite, EmbeddingSite).

    `prepare` may run in any thread; `put` and `drop` belong to the thread that runs the model, between steps.
    """

    def prepare(self, part: Any) -> Any:
        """Cast and lay out a part for the device; the result has `nbytes`. ValueError where it does not fit."""
        ...

    def put(self, slot: int, prepared: Any) -> None: ...

    def drop(self, slot: int) -> None: ...


class SliceSite:
    """One kind of part at one layer of a group: keeps the group's account of what has to be done beside low rank."""

    def __init__(self, group: SiteGroup, site: Site) -> None:
        self._group = group
        self._site = site
        self.prepare = site.prepare

    @property
    def graphed(self) -> bool:
        """Whether a captured CUDA graph serves whatever adapters come here later."""
        return getattr(self._site, "graphed", False)

    def put(self, slot: int, prepared: Any) -> None:
        self._site.put(slot, prepared)
        self._group.note_occupied()

    def drop(self, slot: int) -> None:
        self._site.drop(slot)
        self._group.note_occupied()


class SliceChange(Site, Protocol):
    """A site that changes one layer's outputs in place."""

    @property
    def empty(self) -> bool: ...

    def apply(self, y: Tensor, x: Tensor, segments: Segments) -> None:
        """y: [T, out], a view of the group's output, x: [T, in]."""
        ...


class SiteGroup:
    """Linear layers that read the same input (q, k and v; gate and up; or one alone), computed together.

    Adapters are changed between steps only, by the thread that runs the model. At each layer replaced rows come first,
    then sparse changes, then the low rank with its scale and bias.
    """

    def __init__(
        self,
        sites: Sequence[LinearSite],
        biases: Sequence[Tensor | None],
        dense: Dense,
        dtype: torch.dtype,
        device: torch.device,
        step: StepState,
        segments: str,
    ) -> None:
        self.sites = tuple(sites)
        self.sizes = [s.out_features for s in sites]
        self.dense = dense
        self._own = self._layers()
        self.lowrank = LowRankSite(sites[0].in_features, self.sizes, dtype, device)
        self.routed = RoutedSite(sites[0].in_features, self.sizes, dtype, device)
        self.biases = tuple(biases)
        self._step = step
        self._segments = attrgetter(segments)
        self._input = input_scale_site(device)
        """Used where the group is one layer."""
        self._slices = self._slice_sites(dtype, device)
        self._occupied: list[tuple[slice, SliceChange]] = []
        """Those of `_slices` that hold something, and `_input` as it is: read in every step."""
        self._scales_input = False

    def _layers(self) -> list[Dense]:
        """Each layer for itself."""
        ends = pairwise(accumulate(self.sizes, initial=0))
        return [self.dense] if len(self.sizes) == 1 else [self.dense.columns(*span) for span in ends]

    def _slice_sites(self, dtype: torch.dtype, device: torch.device) -> list[tuple[slice, dict[type, SliceChange]]]:
        """Of each layer its columns, and what can be there by type of part, in the order in which it is applied."""
        found: list[tuple[slice, dict[type, SliceChange]]] = []
        start = 0
        for index, site in enumerate(self.sites):
            kinds: dict[type, SliceChange] = {ReplacedRows: rows_site(dtype, device)}
            if len(self.sites) > 1:
                kinds[InputScale] = SliceInputSite(device, self._own[index])
            kinds[SparsePart] = sparse_site(site.in_features, site.out_features, device)
            found.append((slice(start, start + site.out_features), kinds))
            start += site.out_features
        return found

    def places(self, index: int) -> dict[type, Site]:
        """Where the parts of one layer go, by their type, its low-rank part aside."""
        kinds: dict[type, Site] = {kind: SliceSite(self, site) for kind, site in self._slices[index][1].items()}
        if len(self.sites) == 1:
            kinds[InputScale] = SliceSite(self, self._input)
        return kinds

    def note_occupied(self) -> None:
        self._scales_input = not self._input.empty
        self._occupied = [(cols, s) for cols, kinds in self._slices for s in kinds.values() if not s.empty]

    def input_scales(self) -> tuple[Tensor, Tensor] | None:
        """For a kernel that scales the one layer's input as it makes it: each token's slot, and the slots' scales.

        What it makes is given here as `scaled`. None where no token's adapter scales, or this scales by itself.
        """
        if not (self._scales_input and isinstance(self._input, GatheredScales)):
            return None
        return self._input.of_step(self._segments(self._step.inputs))

    def __call__(self, x: Tensor, scaled: bool = False) -> Tensor:
        """x: [..., in] -> [..., N], the slices of all sites side by side. scaled: x has its tokens' scales in it."""
        if self._scales_input and not scaled:
            x = self._input.scaled(x.reshape(-1, x.shape[-1]), self._segments(self._step.inputs)).view(x.shape)
        y = self.dense(x)
        if self._occupied or not (self.lowrank.empty and self.routed.empty):
            self._adapt(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]))
        return y

    def _adapt(self, y: Tensor, x: Tensor) -> None:
        segments = self._segments(self._step.inputs)
        for columns, site in self._occupied:
            site.apply(y[:, columns], x, segments)
        self.lowrank.apply(y, x, segments)
        if not self.routed.empty:
            self.routed.apply(y, x, segments, self._step.inputs.shares)

    def weight(self, index: int) -> Tensor:
        """[out, in] of one site."""
        return self._own[index].weight()


class SwappedLayer(nn.Module):
    """A layer of ours in the place of one of the base's: a call is its forward's and no more, so it takes no hooks."""

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.forward(x)
        return out


class SiteEmbedding(nn.Module):
    """Stands where the input embedding stood, and keeps its own forward (some scale what they look up)."""

    def __init__(self, base: nn.Module, step: StepState, factor: float) -> None:
        """factor: what `base` multiplies its rows with."""
        super().__init__()
        self.base = base
        weight = base.weight
        assert isinstance(weight, Tensor)
        self.site = embedding_site(weight.device, factor)
        self._step = step

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.base(ids)
        if not self.site.empty:
            self.site.apply(y.view(-1, y.shape[-1]), ids.view(-1), self._step.inputs.segments)
        if self._step.inputs.vectors is not None:
            tokens, values = self._step.inputs.vectors
            y.view(-1, y.shape[-1])[tokens] = values.to(y.dtype)
        return y

    @property
    def weight(self) -> Tensor:
        """For model code that reads a layer's weight (its dtype, as a rule)."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight


class SiteNorm(SwappedLayer):
    """Stands where a normalisation layer stood."""

    def __init__(self, base: nn.Module, step: StepState, token_dim: int) -> None:
        super().__init__()
        self.base = base
        self.site = norm_site(base, token_dim)
        self._step = step
        self._norm: Callable[[Tensor], Tensor] = base.forward

    def forward(self, x: Tensor) -> Tensor:
        y = self._norm(x)
        if not self.site.empty:
            self.site.apply(y, x, self._step.inputs.segments)
        return y

    @property
    def weight(self) -> Tensor:
        """For model code that reads a layer's weight (its dtype, as a rule)."""
        return self.base.weight  # type: ignore[return-value]


class SiteLinear(SwappedLayer):
    """Stands where one linear layer of the base stood."""

    def __init__(self, group: SiteGroup) -> None:
        super().__init__()
        self.group = group
        self.in_features = group.sites[0].in_features
        self.out_features = group.sizes[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.group(x)

    @property
    def weight(self) -> Tensor:
        """For model code that reads a layer's weight (its dtype, as a rule)."""
        return self.group.weight(0)


class _SharedInput:
    """Computes the group when its first sibling is called with an input, and hands each its slice."""

    def __init__(self, group: SiteGroup) -> None:
        self.group = group
        self._input: Tensor | None = None
        self._slices: tuple[Tensor, ...] = ()
        self._served = 0

    def slice(self, x: Tensor, index: int) -> Tensor:
        if self._input is not x:
            self._input, self._served = x, 0
            self._slices = self.group(x).split(self.group.sizes, -1)
        out = self._slices[index]
        self._served += 1
        if self._served == len(self._slices):  # let go of the activations
            self._input, self._slices = None, ()
        return out


class SiblingLinear(SwappedLayer):
    """Stands where one of several linear layers with the same input stood."""

    def __init__(self, shared: _SharedInput, index: int) -> None:
        super().__init__()
        self._shared = shared
        self._index = index
        self.in_features = shared.group.sites[index].in_features
        self.out_features = shared.group.sizes[index]

    def forward(self, x: Tensor) -> Tensor:
        return self._shared.slice(x, self._index)

    @property
    def weight(self) -> Tensor:
        """For model code that reads a layer's weight (its dtype, as a rule)."""
        return self._shared.group.weight(self._index)


def siblings(group: SiteGroup) -> list[nn.Module]:
    """One module per site of the group; called with the same tensor, they share one product."""
    shared = _SharedInput(group)
    return [SiblingLinear(shared, i) for i in range(len(group.sites))]


@dataclass(frozen=True, slots=True)
class SiteRef:
    """Where a named linear site is computed."""

    group: SiteGroup
    index: int

    @property
    def site(self) -> LinearSite:
        return self.group.sites[self.index]

    def weight(self) -> Tensor:
        return self.group.weight(self.index)

    def bias(self) -> Tensor | None:
        return self.group.biases[self.index]


def layer_weight(layer: nn.Module, conv1d: bool) -> Tensor:
    """A linear layer's weight as [out, in]."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().t() if conv1d else weight.detach()
