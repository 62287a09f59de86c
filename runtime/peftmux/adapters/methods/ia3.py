"""IA3: vectors that scale activations. At feed-forward layers the input (bias untouched), elsewhere the output with
its bias.

Source: Liu et al., 2022, arXiv 2205.05638. PEFT saves `<layer>.ia3_l`: [1, in] at feed-forward layers, else [out, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftmux.adapters.base import BaseModel, LinearSite
from peftmux.adapters.config import FieldTable, Honoured, NoEffect, is_text_or_texts
from peftmux.adapters.methods import targeted
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes
from peftmux.adapters.methods.targeted import Targeted
from peftmux.adapters.parts import InputScale, LinearPart, Part

FIELDS: FieldTable = {
    **targeted.FIELDS,
    "feedforward_modules": Honoured(None, is_text_or_texts, "a list of module names or a regular expression"),
    "fan_in_fan_out": NoEffect("a vector scales Linear and Conv1D alike"),
    "init_ia3_weights": NoEffect("initialisation"),
}
_TENSOR = "ia3_l"


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and every tensor's name and shape against the base."""
    found = targeted.read_targeted(config, FIELDS, shapes, base, (_TENSOR,))
    inputs = {site.name for site in found.sites if _scales_input(found, site, shapes)}
    for site in found.sites:
        shape = (1, site.in_features) if site.name in inputs else (site.out_features, 1)
        found.ledger.claim(found.stem(site, _TENSOR)[0], shape)

    def build(tensors: Mapping[str, Tensor]) -> Parts:
        linear: dict[str, LinearPart] = {}
        others: dict[str, tuple[Part, ...]] = {}
        for site in found.sites:
            scale = tensors[found.stem(site, _TENSOR)[0]].flatten()
            if site.name in inputs:
                others[site.name] = (InputScale(scale),)
            else:
                linear[site.name] = LinearPart(out_scale=scale)
        return Parts(linear, others)

    return found.finish("ia3", build)


def _scales_input(found: Targeted, site: LinearSite, shapes: Shapes) -> bool:
    """PEFT's rule for the names; where they are unset, with the target modules, the shape tells."""
    names = found.fields["feedforward_modules"]
    if names is None:
        unset = found.fields["target_modules"] is None
        return unset and shapes.get(found.stem(site, _TENSOR)[0], (0,))[0] == 1 and site.out_features != 1
    if isinstance(names, str):
        return found.matcher.full("feedforward_modules", names, site.name)
    return any(site.name.endswith(name) for name in names)


METHOD = Method("IA3", plan, lambda base: ("ia3",) if base.linear_sites else ())
