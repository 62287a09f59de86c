"""SHiRA: few entries of each weight, added to the base's.

Source: Bhardwaj et al., 2024, arXiv 2406.13175. PEFT saves `<layer>.shira_weight` [n] and `.shira_indices` [2, n]
int32, (row, column) of the weight [out, in].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import FieldTable, Honoured, NoEffect, is_positive_int
from peftmux.adapters.methods import targeted
from peftmux.adapters.methods.indices import checked_indices
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes
from peftmux.adapters.parts import Part, SparsePart

FIELDS: FieldTable = {
    **targeted.FIELDS,
    "r": Honoured(32, is_positive_int, "a positive integer"),
    "mask_type": NoEffect("how the entries were chosen; they are in the files"),
    "random_seed": NoEffect("how the entries were chosen; they are in the files"),
    "init_weights": NoEffect("initialisation"),
    "fan_in_fan_out": NoEffect("PEFT has SHiRA for nn.Linear alone"),
}
_TENSORS = ("shira_weight", "shira_indices")


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and every tensor's name and shape against the base."""
    found = targeted.read_targeted(config, FIELDS, shapes, base, _TENSORS)
    targeted.refuse_conv1d(found, "SHiRA")
    for site in found.sites:
        count = found.fields["r"] * (site.in_features + site.out_features)
        values, indices = found.stem(site, *_TENSORS)
        found.ledger.claim(values, (count,))
        found.ledger.claim(indices, (2, count))

    def build(tensors: Mapping[str, Tensor]) -> Parts:
        others: dict[str, tuple[Part, ...]] = {}
        for site in found.sites:
            values, indices = found.stem(site, *_TENSORS)
            places = checked_indices(indices, tensors[indices], site)
            others[site.name] = (SparsePart(places, tensors[values]),)
        return Parts(others=others)

    return found.finish("shira", build)


METHOD = Method("SHIRA", plan, lambda base: ("shira",) if base.linear_sites else ())
