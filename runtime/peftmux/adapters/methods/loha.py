"""LoHa: the Hadamard product of two low-rank updates, which is a low-rank update of rank r * r.

    (B1 A1) * (B2 A2) = sum_ij (b1_i * b2_j) (a1_i * a2_j)^T        columns b of B, rows a of A

Source: Hyeon-Woo et al., 2022 (FedPara), arXiv 2108.06098. PEFT saves `<layer>.hada_w1_a` [out, r], `.hada_w1_b`
[r, in], `.hada_w2_a`, `.hada_w2_b`; the scale is alpha / r.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import FieldTable, Honoured, NoEffect, is_number, is_pattern_of, is_positive_int
from peftmux.adapters.methods import targeted
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes
from peftmux.adapters.methods.targeted import Targeted
from peftmux.adapters.parts import LinearPart

LYCORIS: FieldTable = {
    **targeted.FIELDS,
    "r": Honoured(8, is_positive_int, "a positive integer"),
    "alpha": Honoured(8, is_number, "a finite number"),
    "rank_pattern": Honoured({}, is_pattern_of(is_positive_int), "an object of positive integers"),
    "alpha_pattern": Honoured({}, is_pattern_of(is_number), "an object of finite numbers"),
    "use_effective_conv2d": NoEffect("of convolutions; linear layers have none of it"),
    "init_weights": NoEffect("initialisation"),
    "rank_dropout": NoEffect("training only"),
    "rank_dropout_scale": NoEffect("training only"),
    "module_dropout": NoEffect("training only"),
}
"""Of LoHa and LoKr."""
_TENSORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and every tensor's name and shape against the base."""
    found = targeted.read_targeted(config, LYCORIS, shapes, base, _TENSORS)
    targeted.refuse_conv1d(found, "LoHa")
    scales = {}
    for site in found.sites:
        rank, alpha = lycoris_rank(found, site.name)
        for name in found.stem(site, "hada_w1_a", "hada_w2_a"):
            found.ledger.claim(name, (site.out_features, rank))
        for name in found.stem(site, "hada_w1_b", "hada_w2_b"):
            found.ledger.claim(name, (rank, site.in_features))
        scales[site.name] = alpha / rank

    def build(tensors: Mapping[str, Tensor]) -> Parts:
        linear = {}
        for site in found.sites:
            b1, a1, b2, a2 = (tensors[name] for name in found.stem(site, *_TENSORS))
            a = (a1[:, None] * a2).flatten(0, 1)  # [r * r, in]
            b = (b1[:, :, None] * b2[:, None]).flatten(1)  # [out, r * r]
            linear[site.name] = shortened(LinearPart(a, b, scales[site.name]))
        return Parts(linear)

    return found.finish("loha", build)


def lycoris_rank(found: Targeted, site: str) -> tuple[int, float]:
    """(rank, alpha) at one layer."""
    values = []
    for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "alpha")):
        key = found.matcher.first_key(pattern, found.fields[pattern], site)
        values.append(found.fields[default] if key is None else found.fields[pattern][key])
    return values[0], values[1]


def shortened(part: LinearPart) -> LinearPart:
    """The same update with no more ranks than its smaller side: B A times the identity."""
    assert part.a is not None
    assert part.b is not None
    out, width = part.b.shape[0], part.a.shape[1]
    if part.rank <= min(out, width):
        return part
    whole = part.b @ part.a
    if out <= width:
        return LinearPart(whole, whole.new_ones(out).diag(), part.scale)
    return LinearPart(whole.new_ones(width).diag(), whole, part.scale)


METHOD = Method("LOHA", plan, lambda base: ("loha",) if base.linear_sites else ())
