"""LN tuning: the normalisation layers' own weights and biases, in the place of the base's.

Source: Qi et al., 2022, arXiv 2211.08682. PEFT saves `<norm>.ln_tuning_layers.weight` [D] and, where the norm has one,
`.ln_tuning_layers.bias` [D].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import COMMON, FieldTable, Honoured, is_text_or_texts, read_fields
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.methods import replaced, targeted
from peftmux.adapters.methods.ledger import PREFIX, Ledger
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes
from peftmux.adapters.parts import NormPart, Part
from peftmux.adapters.patterns import PatternMatcher
from peftmux.adapters.targets import matched_modules

_NAMES = "a list of module names or a regular expression"
FIELDS: FieldTable = {
    **COMMON,
    "modules_to_save": replaced.FIELDS["modules_to_save"],
    "target_modules": Honoured(None, is_text_or_texts, _NAMES),
    "exclude_modules": Honoured(None, is_text_or_texts, _NAMES),
}
_WEIGHT, _BIAS = "ln_tuning_layers.weight", "ln_tuning_layers.bias"


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and every tensor's name and shape against the base."""
    fields, ledger = read_fields(config, FIELDS), Ledger(shapes)
    whole = replaced.plan_whole_modules(fields, base, ledger)
    norms = _norms(fields, targeted.modules_of(ledger, (_WEIGHT, _BIAS), base), base)
    biased = {}
    for name in norms:
        norm = base.norm_sites[name]
        ledger.claim(f"{PREFIX}{name}.{_WEIGHT}", (norm.features,))
        biased[name] = norm.has_bias
        if norm.has_bias:
            ledger.claim(f"{PREFIX}{name}.{_BIAS}", (norm.features,))
    ledger.close()

    def build(tensors: Mapping[str, Tensor]) -> Parts:
        others: dict[str, tuple[Part, ...]] = replaced.build_replaced(whole, tensors, base)
        for name in norms:
            bias = tensors[f"{PREFIX}{name}.{_BIAS}"] if biased[name] else None
            others[name] = (NormPart(tensors[f"{PREFIX}{name}.{_WEIGHT}"], bias),)
        return Parts(others=others)

    return Plan("ln", build)


def _norms(fields: Mapping[str, Any], present: set[str], base: BaseModel) -> list[str]:
    names = present
    if fields["target_modules"] is not None:
        wide = {**fields, "layers_to_transform": None, "layers_pattern": None}
        names = set(matched_modules(wide, base, PatternMatcher()))
    for name in sorted(names):
        if name not in base.norm_sites:
            raise AdapterInvalid(
                Reason.UNSUPPORTED_SITE,
                f"field target_modules: expected normalisation layers that are served in {base.architecture}, "
                f"got {name}",
            )
    if not names:
        raise AdapterInvalid(Reason.NO_SITES, f"expected normalisation layers of {base.architecture}, got none")
    return sorted(names)


METHOD = Method("LN_TUNING", plan, lambda base: ("ln",) if base.norm_sites else ())
