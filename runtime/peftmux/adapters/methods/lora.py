"""LoRA: y = W x + scale B A x at linear layers, with scale alpha / r (rsLoRA: alpha / sqrt(r)).

Source: Hu et al., 2021, arXiv 2106.09685; rsLoRA: Kalajdzievski, 2023, arXiv 2312.03732. PiSSA and LoRA+ are files of
this kind too. Files as PEFT writes them: `base_model.model.<site>.lora_A.weight` [r, in], `.lora_B.weight` [out, r],
with lora_bias `.lora_B.bias` [out], with DoRA `.lora_magnitude_vector` [out], with bias= the replaced base biases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftmux.adapters import targets
from peftmux.adapters.base import BaseModel, LinearSite
from peftmux.adapters.config import (
    COMMON,
    MAX_PATTERNS,
    FieldTable,
    Honoured,
    NoEffect,
    is_number,
    is_pattern_of,
    is_positive_int,
    is_true,
    read_fields,
)
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.methods.dora import site_out_scale
from peftmux.adapters.methods.ledger import Ledger
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes
from peftmux.adapters.parts import LinearPart
from peftmux.adapters.patterns import PatternMatcher

PREFIX = "base_model.model."
_SUFFIXES = (
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_B.bias",
    ".lora_magnitude_vector",
    ".base_layer.weight",
    ".base_layer.bias",
    ".bias",
)
_INITS = (True, "gaussian", "eva", "orthogonal")
_INIT_RULE = (
    "true, false, gaussian, eva or orthogonal (any other replaces base weights while training: save the adapter with "
    "path_initial_model_for_weight_conversion, which makes it a plain LoRA)"
)

FIELDS: FieldTable = {
    **COMMON,
    **targets.FIELDS,
    "r": Honoured(8, is_positive_int, "a positive integer"),
    "lora_alpha": Honoured(8, is_number, "a finite number"),
    "rank_pattern": Honoured(
        {}, is_pattern_of(is_positive_int), f"an object of at most {MAX_PATTERNS} positive integers"
    ),
    "alpha_pattern": Honoured({}, is_pattern_of(is_number), f"an object of at most {MAX_PATTERNS} finite numbers"),
    "use_rslora": Honoured(False, is_true, "true or false"),
    "use_dora": Honoured(False, is_true, "true or false"),
    "lora_bias": Honoured(False, is_true, "true or false"),
    "bias": Honoured("none", lambda v: v in ("none", "all", "lora_only"), "none, all or lora_only"),
    "init_lora_weights": Honoured(True, lambda v: v in _INITS, _INIT_RULE, Reason.UNSUPPORTED_FIELD),
    "lora_dropout": NoEffect("training only"),
    "fan_in_fan_out": NoEffect("A and B are stored the same way for Linear and Conv1D; the base says which it has"),
    "loftq_config": NoEffect("initialisation; init_lora_weights says whether it was used"),
    "eva_config": NoEffect("initialisation; its ranks are in rank_pattern"),
    "corda_config": NoEffect("initialisation; init_lora_weights says whether it was used"),
    "lora_ga_config": NoEffect("initialisation; init_lora_weights says whether it was used"),
    "megatron_core": NoEffect("only read with megatron_config, which is not served"),
    "qalora_group_size": NoEffect("only read with use_qalora, which is not served"),
}


def lora_scaling(alpha: float, r: int, use_rslora: bool) -> float:
    """What B A x is multiplied by: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
    return alpha / math.sqrt(r) if use_rslora else alpha / r


@dataclass(frozen=True, slots=True)
class _Site:
    """One linear site with its tensors' names; None for what it does not have."""

    site: str
    scale: float
    a: str | None = None
    b: str | None = None
    b_bias: str | None = None
    magnitude: str | None = None
    base_weight: str | None = None
    base_bias: str | None = None


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and every tensor's name and shape against the base."""
    fields = read_fields(config, FIELDS)
    if fields["use_dora"] and fields["lora_bias"]:
        raise AdapterInvalid(Reason.INVALID_FIELD, "field lora_bias: expected false with use_dora, got True")
    present = _present_sites(shapes, base)
    matcher = PatternMatcher()
    ledger = Ledger(shapes)
    sites = [
        _plan_site(base.linear_sites[name], fields, ledger, matcher)
        for name in targets.target_sites(fields, present, base, matcher)
    ]
    if fields["bias"] == "all":
        sites += _plain_biases(base, {s.site for s in sites}, ledger)
    ledger.close()
    inferred = fields["target_modules"] is None
    warnings = ("target_modules is unset: the sites are those that have tensors",) if inferred else ()
    return Plan(_kind(fields), lambda tensors: Parts({s.site: _build(s, tensors, base) for s in sites}), warnings)


def kinds(base: BaseModel) -> tuple[str, ...]:
    return ("lora", "rslora", "dora") if base.linear_sites else ()


def _kind(fields: Mapping[str, Any]) -> str:
    if fields["use_dora"]:
        return "dora"
    return "rslora" if fields["use_rslora"] else "lora"


def _present_sites(shapes: Shapes, base: BaseModel) -> set[str]:
    """The sites that the LoRA tensors name. Raises where one is not in the base, or cannot be served."""
    present = set()
    for name in shapes:
        suffix = next((s for s in _SUFFIXES if name.endswith(s)), None)
        if not name.startswith(PREFIX) or suffix is None:
            raise AdapterInvalid(
                Reason.UNUSED_TENSOR,
                f"expected {PREFIX}<module>.lora_A.weight and the like, got tensor {name}: not served",
            )
        site = name[len(PREFIX) : -len(suffix)]
        if site not in base.linear_sites:
            known = site in base.module_names
            raise AdapterInvalid(
                Reason.UNSUPPORTED_SITE if known else Reason.UNKNOWN_SITE,
                f"tensor {name}: expected a linear layer that is served in {base.architecture}, but {site} is "
                + ("another kind of module" if known else "not in this base"),
            )
        if suffix.startswith(".lora_"):
            present.add(site)
    return present


def _plan_site(site: LinearSite, fields: Mapping[str, Any], ledger: Ledger, matcher: PatternMatcher) -> _Site:
    rank = _by_pattern(fields, "rank_pattern", "r", site.name, matcher)
    alpha = _by_pattern(fields, "alpha_pattern", "lora_alpha", site.name, matcher)
    stem = f"{PREFIX}{site.name}"
    a, b = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
    for got in (ledger.claim(a, (None, site.in_features))[0], ledger.claim(b, (site.out_features, None))[1]):
        if got != rank:
            raise AdapterInvalid(
                Reason.RANK_MISMATCH, f"{site.name}: expected rank {rank} as the config says, got {got} in the tensors"
            )

    def vector(suffix: str, wanted: bool) -> str | None:
        if wanted:
            ledger.claim(stem + suffix, (site.out_features,))
        return stem + suffix if wanted else None

    copy = f"{stem}.base_layer.weight"  # PEFT adds it for an output embedding; it must be the base's own
    if has_copy := copy in ledger:
        ledger.claim(copy, (site.out_features, site.in_features))
    return _Site(
        site.name,
        lora_scaling(alpha, rank, fields["use_rslora"]),
        a,
        b,
        vector(".lora_B.bias", fields["lora_bias"]),
        vector(".lora_magnitude_vector", fields["use_dora"]),
        copy if has_copy else None,
        vector(".base_layer.bias", fields["bias"] != "none" and site.has_bias),
    )


def _plain_biases(base: BaseModel, targeted: set[str], ledger: Ledger) -> list[_Site]:
    """bias="all" also trains, and saves, the biases of the layers that have no LoRA."""
    found = []
    for site in base.linear_sites.values():
        if site.has_bias and site.name not in targeted:
            name = f"{PREFIX}{site.name}.bias"
            ledger.claim(name, (site.out_features,))
            found.append(_Site(site.name, 0.0, base_bias=name))
    return found


def _by_pattern(fields: Mapping[str, Any], patterns: str, default: str, site: str, matcher: PatternMatcher) -> Any:
    key = matcher.first_key(patterns, fields[patterns], site)
    return fields[default] if key is None else fields[patterns][key]


def _build(plan: _Site, tensors: Mapping[str, Tensor], base: BaseModel) -> LinearPart:
    """The site's part. Its bias is what must be added for the output to end with the adapter's own base bias."""
    if plan.base_weight:
        _check_copy(plan.site, tensors[plan.base_weight], base)
    a, b = (tensors[name] if name else None for name in (plan.a, plan.b))
    out_scale = None
    if plan.magnitude and a is not None and b is not None:
        out_scale = site_out_scale(base, plan.site, a, b, plan.scale, tensors[plan.magnitude])
    bias = _base_bias_change(plan, tensors, base, out_scale)
    if plan.b_bias:
        scaled = plan.scale * tensors[plan.b_bias]
        bias = scaled if bias is None else bias + scaled
    return LinearPart(a, b, plan.scale, out_scale, bias)


def _base_bias_change(
    plan: _Site, tensors: Mapping[str, Tensor], base: BaseModel, out_scale: Tensor | None
) -> Tensor | None:
    """New base bias minus what the old one has become; None where the bias stays as it is."""
    old = base.bias(plan.site)
    if old is None or (out_scale is None and plan.base_bias is None):
        return None
    old = old.detach().to(device="cpu", dtype=torch.float32)
    new = tensors[plan.base_bias] if plan.base_bias else old
    return new - (old if out_scale is None else out_scale * old)


def _check_copy(site: str, copy: Tensor, base: BaseModel) -> None:
    weight = base.weight(site)
    if not torch.equal(copy.to(weight.device, weight.dtype), weight):
        raise AdapterInvalid(
            Reason.BASE_WEIGHT_DIFFERS,
            f"{site}.base_layer.weight: expected a copy of this base's weight, got other values",
        )


METHOD = Method("LORA", plan, kinds)
