"""LoRA's tensors at weights that `target_parameters` names: stacked experts, routers, and linear layers' own weights.

A stacked weight of E experts has `lora_A.weight` [E * r, in], expert by expert, and `lora_B.weight` [out, r * E],
where the expert is the fastest index; a router's or a linear layer's matrix has A [r, in] and B [out, r]. PEFT wraps
the parameters of one module one around another, in the module's order: the last one's tensors stand under the module's
path, each earlier one has one more `.base_layer` there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peftmux.adapters.base import BaseModel, ParameterSite
from peftmux.adapters.config import Honoured, is_texts, show
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.methods.ledger import PREFIX, Ledger
from peftmux.adapters.methods.lora_linear import claim_low_rank
from peftmux.adapters.parts import ExpertsPart, LinearPart, Part, RouterPart

FIELD = "target_parameters"
FIELDS = {FIELD: Honoured(None, is_texts, "a list of parameter names")}

RankAndScale = Callable[[str], tuple[int, float]]


@dataclass(frozen=True, slots=True)
class ParameterPlan:
    """One parameter with its tensors' names."""

    site: ParameterSite
    rank: int
    scale: float
    a: str
    b: str
    linear: str | None
    """The linear site whose weight it is."""


def plan_parameters(
    fields: Mapping[str, Any], base: BaseModel, ledger: Ledger, rank_and_scale: RankAndScale
) -> list[ParameterPlan]:
    """Claim the tensors of every parameter that the config names."""
    wanted: list[str] = fields[FIELD] or []
    if not wanted:
        return []
    _check_together(fields)
    by_module: dict[str, list[str]] = {}
    for name in base.parameter_names:
        if any(name == target or name.endswith(f".{target}") for target in wanted):
            by_module.setdefault(name.rpartition(".")[0], []).append(name)
    if not by_module:
        raise AdapterInvalid(
            Reason.NO_SITES, f"field {FIELD}: {show(wanted)} matches no parameter of {base.architecture}"
        )
    return [plan for names in by_module.values() for plan in _plan_module(names, base, ledger, rank_and_scale)]


def build_parameters(
    plans: Sequence[ParameterPlan], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, LinearPart], dict[str, tuple[Part, ...]]]:
    """-> the parts of linear sites, and of the other places."""
    linear: dict[str, LinearPart] = {}
    others: dict[str, tuple[Part, ...]] = {}
    for plan in plans:
        a, b = tensors[plan.a], tensors[plan.b]
        if plan.linear is not None:
            linear[plan.linear] = LinearPart(a, b, plan.scale)
        elif plan.site.experts:
            others[plan.site.name] = (_experts_part(plan, a, b),)
        else:
            others[plan.site.name] = (RouterPart(a, b, plan.scale),)
    return linear, others


def _experts_part(plan: ParameterPlan, a: Tensor, b: Tensor) -> ExpertsPart:
    experts, site = plan.site.experts, plan.site
    return ExpertsPart(
        a.view(experts, plan.rank, site.in_features),
        b.view(site.out_features, plan.rank, experts).permute(2, 0, 1),
        plan.scale,
    )


def _plan_module(
    names: Sequence[str], base: BaseModel, ledger: Ledger, rank_and_scale: RankAndScale
) -> list[ParameterPlan]:
    plans = []
    for depth, name in zip(reversed(range(len(names))), names, strict=True):
        site, linear = _site(name, base)
        rank, scale = rank_and_scale(name)
        stem = PREFIX + name.rpartition(".")[0] + ".base_layer" * depth
        a, b = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
        rows = rank * max(site.experts, 1)
        claim_low_rank(ledger, (a, site.in_features), (b, site.out_features), rows, name)
        plans.append(ParameterPlan(site, rank, scale, a, b, linear))
    return plans


def _site(name: str, base: BaseModel) -> tuple[ParameterSite, str | None]:
    """The parameter's shape, and the linear site it belongs to, if it does."""
    module, _, own = name.rpartition(".")
    linear = base.linear_sites.get(module)
    if own == "weight" and linear is not None and not linear.conv1d:
        return ParameterSite(name, 0, linear.in_features, linear.out_features), module
    if name not in base.parameter_sites:
        raise AdapterInvalid(
            Reason.UNSUPPORTED_SITE,
            f"field {FIELD}: expected experts, routers or linear layers that are served in {base.architecture}, "
            f"got {name}",
        )
    return base.parameter_sites[name], None


def _check_together(fields: Mapping[str, Any]) -> None:
    """What PEFT refuses beside parameters, or would train beside them under names of its own."""
    for name in ("use_dora", "lora_bias", "alora_invocation_tokens"):
        if fields[name]:
            raise AdapterInvalid(
                Reason.INVALID_FIELD, f"field {name}: expected nothing with {FIELD}, got {show(fields[name])}"
            )
    if fields["bias"] != "none":
        raise AdapterInvalid(
            Reason.UNSUPPORTED_FIELD,
            f"field bias is not served with {FIELD}: expected none, got {show(fields['bias'])}",
        )
