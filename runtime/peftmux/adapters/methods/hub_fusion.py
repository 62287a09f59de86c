"""AdapterFusion as AdapterHub's library saves it (Pfeiffer et al., 2020, arXiv 2005.00247).

`<layer>.*_adapters.adapter_fusion_layer.<name>.{query,key,value}` beside the fused adapters' own tensors. What is fused
is what the adapters compute before a norm of their own (`adapter_norm_after` is in the files and has no effect).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import FieldTable, Honoured, NoEffect, show
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.hub_fields import FUSION_CONFIG, FUSION_OUTER, is_flag, read_exact, read_outer
from peftmux.adapters.methods.bottleneck import PLACES, BottleneckPlan
from peftmux.adapters.methods.ledger import Ledger
from peftmux.adapters.methods.registry import Parts, Plan
from peftmux.adapters.parts import Fusion

_ON = ("key", "query", "value", "value_before_softmax")
_OFF = ("query_before_ln", "residual_before", "temperature")
FIELDS: FieldTable = {
    **{name: Honoured(False, is_flag, "true or false") for name in (*_ON, *_OFF)},
    **{name: NoEffect("training only") for name in ("dropout_prob", "regularization", "value_initialized")},
}


def plan_hub_fusion(
    fusion: Mapping[str, Any], adapters: Mapping[str, Mapping[str, BottleneckPlan]], ledger: Ledger, base: BaseModel
) -> Plan:
    """fusion: all of adapter_fusion_config.json; adapters: each one's bottlenecks by branch, in the fusion's order."""
    _check_fields(fusion, base)
    plans = {name: {branch: plan.fused() for branch, plan in own.items()} for name, own in adapters.items()}
    branches = next(iter(plans.values())).keys()
    if any(own.keys() != branches for own in plans.values()):
        raise AdapterInvalid(Reason.UNSUPPORTED_FIELD, "expected fused adapters at the same branches")
    reads = {plan.reads for own in plans.values() for plan in own.values()}
    if len(reads) > 1:
        raise AdapterInvalid(Reason.UNSUPPORTED_FIELD, f"expected fused adapters to read the same, got {sorted(reads)}")
    stems = {branch: _claim(branch, fusion["name"], ledger, base) for branch in branches}

    def build(tensors: Mapping[str, Tensor]) -> Parts:
        fused = {}
        for branch, stem in stems.items():
            own = tuple(plan[branch].build(tensors) for plan in plans.values())
            names = ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight")
            query, query_bias, key, key_bias, value = (tensors[stem + name] for name in names)
            fused[branch] = (Fusion(own, query, query_bias, key, key_bias, value),)
        return Parts(others=fused)

    return Plan("fusion", build)


def _check_fields(fusion: Mapping[str, Any], base: BaseModel) -> None:
    read_outer(fusion, FUSION_OUTER, FUSION_CONFIG, base)
    own = fusion.get("config")
    if not isinstance(own, dict):
        raise AdapterInvalid(
            Reason.MALFORMED_CONFIG, f"field config of {FUSION_CONFIG}: expected an object, got {show(own)}"
        )
    fields = read_exact(own, FIELDS, FUSION_CONFIG)
    for name in (*_ON, *_OFF):
        if fields[name] is not (name in _ON):
            expected, got = (str(value).lower() for value in (name in _ON, fields[name]))
            raise AdapterInvalid(
                Reason.UNSUPPORTED_FIELD, f"field {name} of {FUSION_CONFIG}: expected {expected}, got {got}"
            )


def _claim(branch: str, name: str, ledger: Ledger, base: BaseModel) -> str:
    found, width = base.branches[branch], base.state_width
    stem = f"fusion/{branch.rpartition('.')[0]}.{PLACES[found.role]}.adapter_fusion_layer.{name}."
    for part in ("query", "key", "value"):
        ledger.claim(f"{stem}{part}.weight", (width, width))
        if part != "value":
            ledger.claim(f"{stem}{part}.bias", (width,))
    return stem
