"""DiffPruning: a sparse difference to weights and biases.

Source: Guo et al., 2021, arXiv 2012.07463. No reference writes files; ours are the two of PEFT with `peft_type`
DIFFPRUNING and, for each changed linear layer, `base_model.model.<layer>.diff_values` [n] with `.diff_indices` [2, n]
int32 (row, column of the weight [out, in]); with `bias` also `.bias_diff` [out] of each that has a bias. All of them
add. Without the field `bias` the changed layers that have a bias have a difference to it all or none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import FieldTable, Honoured, NoEffect
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.methods import targeted
from peftmux.adapters.methods.indices import checked_indices
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes
from peftmux.adapters.parts import LinearPart, Part, SparsePart

FIELDS: FieldTable = {
    **targeted.FIELDS,
    "bias": Honoured(None, lambda v: isinstance(v, bool), "true or false"),
    "sparsity": NoEffect("how many entries were kept; they are in the files"),
}
_VALUES, _INDICES, _BIAS = "diff_values", "diff_indices", "bias_diff"


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and every tensor's name and shape against the base."""
    found = targeted.read_targeted(config, FIELDS, shapes, base, (_VALUES, _INDICES, _BIAS))
    ledger = found.ledger
    with_biases = found.fields["bias"] or any(name.endswith(f".{_BIAS}") for name in shapes)
    biased = {site.name for site in found.sites if with_biases and site.has_bias}
    for site in found.sites:
        values, indices, bias = found.stem(site, _VALUES, _INDICES, _BIAS)
        (count,) = ledger.claim(values, (None,))
        ledger.claim(indices, (2, count))
        if site.name in biased:
            ledger.claim(bias, (site.out_features,))
        elif bias in ledger:
            raise AdapterInvalid(Reason.UNUSED_TENSOR, f"tensor {bias}: expected none, this base has no such bias")

    def build(tensors: Mapping[str, Tensor]) -> Parts:
        linear: dict[str, LinearPart] = {}
        others: dict[str, tuple[Part, ...]] = {}
        for site in found.sites:
            values, indices, bias = found.stem(site, _VALUES, _INDICES, _BIAS)
            others[site.name] = (SparsePart(checked_indices(indices, tensors[indices], site), tensors[values]),)
            if site.name in biased:
                linear[site.name] = LinearPart(bias=tensors[bias])
        return Parts(linear, others)

    return found.finish("diffpruning", build)


METHOD = Method("DIFFPRUNING", plan, lambda base: ("diffpruning",) if base.linear_sites else ())
