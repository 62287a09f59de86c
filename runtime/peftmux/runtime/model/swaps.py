"""Replaces layers of a loaded transformers model: linear layers by adapter sites, slow ones by equal faster ones.

Nothing is replaced by name alone: a faster norm, feed-forward or rotary embedding stands in only where it gives the
original's numbers on random input. The whole model is compared with the original once more when it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftmux.adapters.base import FeedForwardSite, LinearSite, NormLayer, ParameterSite, ResidualBranch
from peftmux.adapters.experts import expert_weights, is_router, router_site
from peftmux.adapters.feed_forward import feed_forward
from peftmux.adapters.norms import norm_site
from peftmux.adapters.parts import FIRST_PASS, IMAGES, LADDER, VIRTUAL_TOKENS, ClassifierPart, VirtualRows, VisionPart
from peftmux.adapters.quantised import is_linear, is_quantised
from peftmux.adapters.tables import table_scale
from peftmux.kernels.bottleneck import Bottleneck, Fusion
from peftmux.kernels.dense import DenseForm
from peftmux.kernels.elementwise import choose_elementwise
from peftmux.kernels.embedding import EmbeddingPart
from peftmux.kernels.experts import ExpertsPart, RouterPart
from peftmux.kernels.ladder import Ladder
from peftmux.kernels.mixture import MixturePart
from peftmux.kernels.norms import NormPart
from peftmux.kernels.routed import RoutedPart
from peftmux.kernels.virtual import VirtualSite
from peftmux.kernels.vision import VisionSite
from peftmux.runtime.model.branches import BranchForward
from peftmux.runtime.model.dense import QuantisedDense, stack
from peftmux.runtime.model.experts import experts_forward, router_forward
from peftmux.runtime.model.fast import FastRMSNorm, fast_swiglu, is_rms_norm, is_swiglu
from peftmux.runtime.model.first_pass import FirstPass
from peftmux.runtime.model.ladders import Ladders
from peftmux.runtime.model.mixtures import MixedForward, Mixtures
from peftmux.runtime.model.rotary import swap_rotary
from peftmux.runtime.model.sites import (
    Site,
    SiteEmbedding,
    SiteGroup,
    SiteLinear,
    SiteNorm,
    SiteRef,
    layer_weight,
    siblings,
)
from peftmux.runtime.model.step import StepState

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Swapper:
    """Walks one model once. `sites` lists the linear sites that adapters can attach to."""

    def __init__(
        self,
        model: PreTrainedModel,
        token_linears: frozenset[str],
        token_norms: Mapping[str, int],
        dense: DenseForm,
        step: StepState,
    ) -> None:
        self._model = model
        self._token_linears = token_linears
        self._token_norms = token_norms
        self._dense = dense
        self._step = step
        self._fast = choose_elementwise(model.device, model.dtype)
        self._head = model.get_output_embeddings()
        self.sites: dict[str, SiteRef] = {}
        self.places: dict[tuple[type, str], Site] = {}
        """By type of part and name of place: where every part goes that is not at a linear site's low rank."""
        self.first_pass = FirstPass(model.device)
        self.places[ClassifierPart, FIRST_PASS] = self.first_pass
        self.norm_sites: dict[str, NormLayer] = {}
        self.virtual = VirtualSite(model.dtype, model.device)
        self.vision = VisionSite(model.device)
        self.places[VisionPart, IMAGES] = self.vision
        self.parameter_sites: dict[str, ParameterSite] = {}
        self.feed_forwards: dict[str, FeedForwardSite] = {}
        self.ladders: Ladders

    def run(self) -> None:
        swap_rotary(self._model, self._fast)
        self._swap_embedding()
        for path, parent in list(self._model.named_modules()):
            mixtures = self._find_feed_forward(path, parent)
            self._swap_siblings(path, parent, mixtures)
            self._swap_experts(path, parent)
            for name, child in list(parent.named_children()):
                full = f"{path}.{name}" if path else name
                if is_linear(child) or type(child) is Conv1D:
                    setattr(parent, name, SiteLinear(self._group([full], [child])))
                elif full in self._token_norms or is_rms_norm(child):
                    setattr(parent, name, self._norm(full, child))

    def swap_branches(self, branches: Mapping[str, ResidualBranch]) -> None:
        """After `run`, which gives the blocks their faster forms."""
        for name, branch in branches.items():
            module = self._model.get_submodule(name)
            norm = self._model.get_submodule(branch.norm)
            forward = BranchForward(module, norm, self._step, self._model.dtype, self._model.device)
            self.places[Bottleneck, name] = self.places[Fusion, name] = forward.site

    def watch_stream(self, layers: Sequence[str]) -> None:
        """Let side networks read what these layers give."""
        self.ladders = Ladders(self._model, layers, self._step)
        self.places[Ladder, LADDER] = self.ladders

    def _norm(self, name: str, norm: nn.Module) -> nn.Module:
        fast = FastRMSNorm(norm, self._fast) if is_rms_norm(norm) else norm
        if name not in self._token_norms:
            return fast
        swapped = SiteNorm(fast, self._step, self._token_norms[name])
        self.norm_sites[name] = norm_site(name, norm)
        self.places[NormPart, name] = swapped.site
        return swapped

    def _swap_embedding(self) -> None:
        table = self._model.get_input_embeddings()
        path = next(name for name, module in self._model.named_modules() if module is table)
        if isinstance(table, nn.Embedding):
            factor = table_scale(table)
            swapped = SiteEmbedding(table, self._step, factor or 1.0)
            self._model.set_input_embeddings(swapped)
            self.places[VirtualRows, VIRTUAL_TOKENS] = self.virtual
            if factor is not None:
                self.places[EmbeddingPart, path] = swapped.site

    def _find_feed_forward(self, path: str, module: nn.Module) -> Mixtures | None:
        block = feed_forward(module)
        if block is None:
            return None
        mixtures = Mixtures(module, block, self._step)
        if all(f"{path}.{name}" in self._token_linears for name in (*block.inner, block.outer)):
            module.forward = MixedForward(module, mixtures)
            self.feed_forwards[path] = block.site(path)
            self.places[MixturePart, path] = mixtures.site
        return mixtures

    def _swap_siblings(self, path: str, parent: nn.Module, mixtures: Mixtures | None) -> None:
        for names in _SIBLINGS:
            layers = [getattr(parent, name, None) for name in names]
            first = layers[0]
            if any(type(layer) is not nn.Linear for layer in layers) or not isinstance(first, nn.Linear):
                continue
            if any(layer.in_features != first.in_features for layer in layers):  # type: ignore[union-attr]
                continue
            swiglu = mixtures is not None and names[0] == "gate_proj" and is_swiglu(parent)
            group = self._group([f"{path}.{name}" for name in names], layers)  # type: ignore[arg-type]
            for name, module in zip(names, siblings(group), strict=True):
                setattr(parent, name, module)
            if swiglu and mixtures is not None:
                parent.forward = fast_swiglu(group, parent, self._fast, mixtures)

    def _swap_experts(self, path: str, module: nn.Module) -> None:
        weights = expert_weights(module, path)
        if weights is not None and (experts := experts_forward(module, weights, self._step)):
            module.forward = experts
            for site, place in ((weights.up, experts.up), (weights.down, experts.down)):
                self.parameter_sites[site.name] = site
                self.places[ExpertsPart, site.name] = place
        elif is_router(module) and (router := router_forward(module, self._step)):
            module.forward = router
            site = router_site(path, module)
            self.parameter_sites[site.name] = site
            self.places[RouterPart, site.name] = router.site

    def _group(self, names: Sequence[str], layers: Sequence[nn.Module]) -> SiteGroup:
        sites, weights, biases = [], [], []
        for name, layer in zip(names, layers, strict=True):
            conv1d = isinstance(layer, Conv1D)
            bias = _bias(layer)
            if is_quantised(layer):
                sites.append(_quantised_site(name, layer))
            else:
                weight = layer_weight(layer, conv1d)
                sites.append(LinearSite(name, weight.shape[1], weight.shape[0], bias is not None, conv1d))
                weights.append(weight)
            biases.append(bias)
        segments = "kept" if layers[0] is self._head else "segments"
        dense = self._dense(*stack(weights, biases)) if weights else QuantisedDense(layers[0])
        group = SiteGroup(sites, biases, dense, self._model.dtype, self._model.device, self._step, segments)
        for index, name in enumerate(names):
            if name in self._token_linears:
                self.sites[name] = SiteRef(group, index)
                self.places |= {(kind, name): place for kind, place in group.places(index).items()}
                self.places[RoutedPart, name] = group.routed.slice(index)
        return group


def _quantised_site(name: str, layer: Any) -> LinearSite:
    return LinearSite(name, layer.in_features, layer.out_features, layer.bias is not None, conv1d=False)


def _bias(layer: nn.Module) -> Tensor | None:
    bias = layer.bias
    return bias.detach() if isinstance(bias, Tensor) else None
