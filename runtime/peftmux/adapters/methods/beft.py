"""BEFT: a trained bias added to the output of some projections, the value projections as a rule.

PEFT saves `<layer>.beft_bias` [1, out].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import FieldTable, NoEffect
from peftmux.adapters.methods import targeted
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes
from peftmux.adapters.parts import LinearPart

FIELDS: FieldTable = {
    **targeted.FIELDS,
    "init_weights": NoEffect("initialisation"),
    "fan_in_fan_out": NoEffect("a bias is added alike for Linear and Conv1D"),
}


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and every tensor's name and shape against the base."""
    found = targeted.read_targeted(config, FIELDS, shapes, base, ("beft_bias",))
    names = {site.name: found.stem(site, "beft_bias")[0] for site in found.sites}
    for site in found.sites:
        found.ledger.claim(names[site.name], (1, site.out_features))

    def build(tensors: Mapping[str, Tensor]) -> Parts:
        return Parts({site: LinearPart(bias=tensors[name].flatten()) for site, name in names.items()})

    return found.finish("beft", build)


METHOD = Method("BEFT", plan, lambda base: ("beft",) if base.linear_sites else ())
