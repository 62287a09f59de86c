"""Which linear layers of a live model an adapter acts on, by the rules its file will be read with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from peftmux.adapters.errors import AdapterInvalid
from peftmux.adapters.patterns import PatternMatcher
from peftmux.adapters.targets import target_sites
from peftmux.adapters.torch_base import TorchBase
from peftmux.trainer.errors import OptionError

ALL_LINEAR = "all-linear"
_NOT_NARROWED = {"layers_to_transform": None, "layers_pattern": None}


def select_sites(
    model: Any,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: Sequence[str] | None = None,
) -> dict[str, nn.Module]:
    """The chosen linear layers by module path, by PEFT's fields.

    Raises OptionError where nothing matches, a listed name matches no linear layer, or a match is not one.
    """
    base = TorchBase(model)
    targets, layers = target_modules, layers_to_transform
    fields = {
        "target_modules": targets,
        "exclude_modules": exclude_modules,
        "layers_to_transform": layers,
        "layers_pattern": layers_pattern,
    }
    if targets == ALL_LINEAR and layers is not None:  # what is narrowed has to be a list
        every = target_sites({**fields, **_NOT_NARROWED}, (), base, PatternMatcher())
        targets = sorted({name.rpartition(".")[2] for name in every})
        fields["target_modules"] = targets
    if not isinstance(targets, str):
        _check_names(targets, base)
        for layer in [layers] if isinstance(layers, int) else layers or ():
            _check_layer(layer, fields, base)
    try:
        names = target_sites(fields, (), base, PatternMatcher())
    except AdapterInvalid as error:
        raise OptionError("target-modules", str(error)) from None
    return {name: model.get_submodule(name) for name in names}


def _check_layer(layer: int, fields: Mapping[str, Any], base: TorchBase) -> None:
    try:
        target_sites({**fields, "layers_to_transform": [layer]}, (), base, PatternMatcher())
    except AdapterInvalid:
        raise OptionError("layers-to-transform", f"no layer {layer} has such linear layers; the first is 0") from None


def is_named(path: str, wanted: str) -> bool:
    """Whether a module's path is, or ends with, these names."""
    return path == wanted or path.endswith(f".{wanted}")


def path_of(model: nn.Module, module: nn.Module | None) -> str:
    """The module's path in the model; "" where it has none."""
    return next((name for name, found in model.named_modules() if found is module), "")


def spelled_out(model: Any, sites: Sequence[str]) -> list[str]:
    """The shortest target_modules that selects exactly these sites: last names where they suffice, else whole paths."""
    last = sorted({site.rpartition(".")[2] for site in sites})
    base = TorchBase(model)
    same = [name for name in base.module_names if name.rpartition(".")[2] in last]
    return last if sorted(same) == sorted(sites) else sorted(sites)


def _check_names(targets: Sequence[str], base: TorchBase) -> None:
    for wanted in targets:
        if not any(is_named(name, wanted) for name in base.linear_sites):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in base.linear_sites}))
            raise OptionError("target-modules", f"no linear layer is named {wanted!r}; this base has {known}")
