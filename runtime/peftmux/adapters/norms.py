"""Which modules of a transformers model are normalisation layers that adapters can change."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from peftmux.adapters.base import NormLayer


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Norms by their class's name, with a vector for a weight and nothing but it and perhaps a bias to learn."""
    named = ((name, module) for name, module in model.named_modules() if type(module).__name__.endswith("Norm"))
    return {name: module for name, module in named if _is_plain(vectors(module), module)}


def vectors(norm: nn.Module) -> Mapping[str, Tensor]:
    """The parameters of its own that are vectors."""
    return {name: p for name, p in norm.named_parameters(recurse=False) if p.dim() == 1}


def norm_site(name: str, norm: nn.Module) -> NormLayer:
    own = vectors(norm)
    return NormLayer(name, own["weight"].shape[0], "bias" in own)


def _is_plain(own: Mapping[str, Tensor], norm: nn.Module) -> bool:
    return own.keys() in ({"weight"}, {"weight", "bias"}) and len(list(norm.parameters())) == len(own)
