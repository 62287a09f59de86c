"""LoRA's tensors at one linear layer, and the part that they make.

`<site>.lora_A.weight` [r, in], `.lora_B.weight` [out, r], with lora_bias `.lora_B.bias` [out], with DoRA
`.lora_magnitude_vector` [out], with bias= the replaced base bias. PEFT adds a copy of the base layer, `.base_layer.*`,
where the config names the output projection.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftmux.adapters.base import BaseModel, LinearSite
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.methods.dora import chunked_out_scale
from peftmux.adapters.methods.ledger import PREFIX, Ledger
from peftmux.adapters.parts import LinearPart


@dataclass(frozen=True, slots=True)
class LinearPlan:
    """One linear site with its tensors' names; None for what it does not have."""

    site: str
    scale: float
    a: str | None = None
    b: str | None = None
    b_bias: str | None = None
    magnitude: str | None = None
    base_weight: str | None = None
    base_bias: str | None = None


def plan_linear(site: LinearSite, rank: int, scale: float, fields: Mapping[str, Any], ledger: Ledger) -> LinearPlan:
    """Claim a targeted site's tensors."""
    stem = f"{PREFIX}{site.name}"
    a, b = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
    claim_low_rank(ledger, (a, site.in_features), (b, site.out_features), rank, site.name)

    def vector(suffix: str, wanted: bool) -> str | None:
        if wanted:
            ledger.claim(stem + suffix, (site.out_features,))
        return stem + suffix if wanted else None

    copy = claim_copy(ledger, stem, (site.out_features, site.in_features))
    copied_bias = copy is not None and f"{stem}.base_layer.bias" in ledger
    return LinearPlan(
        site.name,
        scale,
        a,
        b,
        vector(".lora_B.bias", fields["lora_bias"]),
        vector(".lora_magnitude_vector", fields["use_dora"]),
        copy,
        vector(".base_layer.bias", site.has_bias and (fields["bias"] != "none" or copied_bias)),
    )


def plan_plain_biases(base: BaseModel, targeted: set[str], ledger: Ledger) -> list[LinearPlan]:
    """bias="all" also trains, and saves, the biases of the layers that have no LoRA."""
    found = []
    for site in base.linear_sites.values():
        if site.has_bias and site.name not in targeted:
            name = f"{PREFIX}{site.name}.bias"
            ledger.claim(name, (site.out_features,))
            found.append(LinearPlan(site.name, 0.0, base_bias=name))
    return found


def plan_norm_biases(base: BaseModel, replaced: Container[str], ledger: Ledger) -> dict[str, str]:
    """bias="all" trains those of normalisation layers as well: their tensors by the norm's path."""
    names = {n.name: f"{PREFIX}{n.name}.bias" for n in base.norm_sites.values() if n.has_bias}
    names = {norm: name for norm, name in names.items() if norm not in replaced}
    for norm, name in names.items():
        ledger.claim(name, (base.norm_sites[norm].features,))
    return names


def claim_low_rank(ledger: Ledger, a: tuple[str, int], b: tuple[str, int], rank: int, site: str) -> None:
    """Claim A [rank, in] and B [out, rank], each given as (name, in) and (name, out)."""
    for name, got in ((a[0], ledger.claim(a[0], (None, a[1]))[0]), (b[0], ledger.claim(b[0], (b[1], None))[1])):
        if got != rank:
            raise AdapterInvalid(
                Reason.RANK_MISMATCH,
                f"{site}: expected rank {rank} as the config says, got {got} in tensor {name}",
            )


def claim_copy(ledger: Ledger, stem: str, shape: tuple[int, int]) -> str | None:
    """The copy of the base's weight that PEFT saves beside an adapter of the vocabulary, where there is one."""
    name = f"{stem}.base_layer.weight"
    if name not in ledger:
        return None
    ledger.claim(name, shape)
    return name


def check_copy(site: str, copy: Tensor, weight: Tensor) -> None:
    """PEFT loads a copy over the base's weight; serving without it is exact where both are the same."""
    if not torch.equal(copy.to(weight.device, weight.dtype), weight):
        raise AdapterInvalid(
            Reason.BASE_WEIGHT_DIFFERS,
            f"{site}.base_layer.weight: expected a copy of this base's weight, got other values",
        )


def build_linear(plan: LinearPlan, tensors: Mapping[str, Tensor], base: BaseModel) -> LinearPart:
    """The site's part. Its bias is what must be added for the output to end with the adapter's own base bias."""
    if plan.base_weight:
        check_copy(plan.site, tensors[plan.base_weight], base.weight(plan.site))
    a, b = (tensors[name] if name else None for name in (plan.a, plan.b))
    out_scale = None
    if plan.magnitude and a is not None and b is not None:
        out_scale = chunked_out_scale(base.weight(plan.site), a, b, plan.scale, tensors[plan.magnitude])
    bias = _base_bias_change(plan, tensors, base, out_scale)
    if plan.b_bias:
        scaled = plan.scale * tensors[plan.b_bias]
        bias = scaled if bias is None else bias + scaled
    return LinearPart(a, b, plan.scale, out_scale, bias)


def _base_bias_change(
    plan: LinearPlan, tensors: Mapping[str, Tensor], base: BaseModel, out_scale: Tensor | None
) -> Tensor | None:
    """New base bias minus what the old one has become; None where the bias stays as it is."""
    old = base.bias(plan.site)
    if old is None or (out_scale is None and plan.base_bias is None):
        return None
    old = old.detach().to(device="cpu", dtype=torch.float32)
    new = tensors[plan.base_bias] if plan.base_bias else old
    return new - (old if out_scale is None else out_scale * old)
