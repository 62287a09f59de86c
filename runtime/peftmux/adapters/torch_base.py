"""A plain transformers causal LM as lowering sees it: for the trainer, for merging and for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from peftmux.adapters.base import FeedForwardSite, KVShape, LinearSite, NormLayer, ParameterSite, ResidualBranch
from peftmux.adapters.branches import residual_branches
from peftmux.adapters.experts import parameter_names, parameter_sites
from peftmux.adapters.feed_forward import feed_forward
from peftmux.adapters.norms import norm_layers, norm_site
from peftmux.adapters.probing import evaluating
from peftmux.adapters.quantised import dequantised, is_quantised
from peftmux.adapters.stream import stream_layers
from peftmux.adapters.tables import table_scale

_NO_PRODUCTS = ("Router", "GroupedLinear")
"""Subclasses of nn.Linear in transformers' models that give something else: scores and choices, products by group."""


class TorchBase:
    """Implements `BaseModel`. The module stays the caller's; its weights are read, and changed by `merge` alone."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        config: Any = module.config
        self._text_config = config.get_text_config(decoder=True)

    @property
    def architecture(self) -> str:
        return type(self.module).__name__

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.module.parameters() if p.is_floating_point())

    @property
    def hidden_size(self) -> int:
        return int(self._text_config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self._text_config.vocab_size)

    @cached_property
    def state_width(self) -> int:
        module: Any = self.module
        if module.base_model is module:
            return 0
        width = getattr(module.get_output_embeddings(), "in_features", None)
        return int(width or self.hidden_size)

    @cached_property
    def linear_sites(self) -> Mapping[str, LinearSite]:
        sites = (_site(name, module) for name, module in self.module.named_modules())
        return {site.name: site for site in sites if site}

    @cached_property
    def branches(self) -> Mapping[str, ResidualBranch]:
        return residual_branches(self.module)

    @cached_property
    def stream_layers(self) -> Sequence[str]:
        return stream_layers(self.module) if self.state_width else ()

    @cached_property
    def norm_sites(self) -> Mapping[str, NormLayer]:
        return {name: norm_site(name, norm) for name, norm in norm_layers(self.module).items()}

    @cached_property
    def parameter_sites(self) -> Mapping[str, ParameterSite]:
        return parameter_sites(self.module)

    @cached_property
    def feed_forwards(self) -> Mapping[str, FeedForwardSite]:
        found = ((name, feed_forward(module)) for name, module in self.module.named_modules())
        return {name: block.site(name) for name, block in found if block}

    @cached_property
    def parameter_names(self) -> Sequence[str]:
        return parameter_names(self.module)

    @cached_property
    def module_names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.module.named_modules() if name)

    @cached_property
    def embedding(self) -> str:
        table = self.module.get_input_embeddings()  # type: ignore[operator]
        return _path(self.module, table) if table_scale(table) is not None else ""

    @property
    def embedding_width(self) -> int:
        return int(self.module.get_input_embeddings().weight.shape[1])  # type: ignore[operator]

    @property
    def takes_virtual_tokens(self) -> bool:
        return isinstance(self.module.get_input_embeddings(), nn.Embedding)  # type: ignore[operator]

    @cached_property
    def head(self) -> str | None:
        head = self.module.get_output_embeddings()  # type: ignore[operator]
        return _path(self.module, head) if isinstance(head, nn.Linear) else None

    @cached_property
    def tied(self) -> bool:
        if self.head is None or not self.embedding:
            return False
        return self.weight(self.head).data_ptr() == self.embedding_weight().data_ptr()

    @property
    def shows_hidden_state(self) -> bool:
        return True

    @cached_property
    def windowed(self) -> bool:
        window = getattr(self._text_config, "sliding_window", None)
        layers = getattr(self._text_config, "layer_types", None)
        used = getattr(self._text_config, "use_sliding_window", True)
        return bool(window and used) and (layers is None or "sliding_attention" in layers)

    @cached_property
    def kv_shapes(self) -> Sequence[KVShape]:
        """As the model fills its own cache for one token: right for every architecture, also where layers differ."""
        return _probe_cache(self.module)

    def weight(self, site: str) -> Tensor:
        layer = self.module.get_submodule(site)
        if is_quantised(layer):
            return dequantised(layer)
        weight = self.module.get_parameter(f"{site}.weight").detach()
        return weight.T if self.linear_sites[site].conv1d else weight

    def bias(self, site: str) -> Tensor | None:
        return self.module.get_parameter(f"{site}.bias").detach() if self.linear_sites[site].has_bias else None

    def embedding_weight(self) -> Tensor:
        return self.module.get_parameter(f"{self.embedding}.weight").detach()


def _path(root: nn.Module, module: nn.Module | None) -> str:
    return next((name for name, found in root.named_modules() if found is module), "")


def _site(name: str, module: nn.Module) -> LinearSite | None:
    if isinstance(module, nn.Linear) and not type(module).__name__.endswith(_NO_PRODUCTS):
        return LinearSite(name, module.in_features, module.out_features, module.bias is not None, conv1d=False)
    if isinstance(module, Conv1D):
        rows, columns = module.weight.shape
        return LinearSite(name, rows, columns, module.bias is not None, conv1d=True)
    return None


@torch.no_grad()
def _probe_cache(module: Any) -> tuple[KVShape, ...]:
    """One token through the model in eval mode (checkpointing in training would switch the cache off)."""
    cache = DynamicCache(config=module.config)
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(module.parameters()).device)
    with evaluating(module):
        module(input_ids=ids, past_key_values=cache, use_cache=True)
    layers: list[Any] = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    filled = [(layer.keys, layer.values) for layer in layers]
    return tuple(KVShape(k.shape[1], k.shape[3], v.shape[3]) for k, v in filled)
