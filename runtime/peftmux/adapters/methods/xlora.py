"""X-LoRA: LoRA experts, weighed for each token and layer by a classifier of the base model's last hidden state.

    y = W x + sum_e g_le(h) * scale_e B_e A_e x        h: the last hidden state of a first pass without the experts

Source: Buehler and Buehler, 2024, arXiv 2402.07148; fields and numbering of the layers as PEFT's XLoraConfig has them.

Files. PEFT 0.21 writes folders that it cannot read back: the classifier's first layer is missing, and experts lose
tensors whose names contain their number. So what is served is one complete folder, which `peftmux adapters convert`
makes of PEFT's, of the experts' own folders, and of `classifier_full.safetensors` where PEFT's classifier is torn:
`base_model.internal_xlora_classifier.layers.N.weight` and `.bias` as PEFT numbers them, and for each expert K and layer
`base_model.model.<layer>.experts.K.lora_A.weight` [r, in] and `.lora_B.weight` [out, r], scaled already. `adapters` has
one entry for each expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import (
    COMMON,
    FieldTable,
    Honoured,
    NoEffect,
    is_number,
    is_positive_int,
    is_true,
    read_fields,
)
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.methods.ledger import PREFIX, Ledger
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes
from peftmux.adapters.parts import FIRST_PASS, ClassifierPart, RoutedPart
from peftmux.kernels.routed import ShareRule

CLASSIFIER = "base_model.internal_xlora_classifier.layers."
_COUNT = "a positive integer"

FIELDS: FieldTable = {
    **COMMON,
    "adapters": Honoured(None, lambda v: isinstance(v, dict), "an object with an entry for each expert"),
    "hidden_size": Honoured(None, is_positive_int, _COUNT),
    "enable_softmax": Honoured(True, is_true, "true or false"),
    "enable_softmax_topk": Honoured(False, is_true, "true or false"),
    "layerwise_scalings": Honoured(False, is_true, "true or false"),
    "xlora_depth": Honoured(1, lambda v: is_positive_int(v) and v <= 64, "a positive integer of at most 64"),
    "xlora_size": Honoured(2048, is_positive_int, _COUNT),
    "xlora_dropout_p": Honoured(0.2, lambda v: is_number(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "softmax_temperature": Honoured(1.0, lambda v: is_number(v) and v > 0, "a positive number"),
    "top_k_lora": Honoured(None, is_positive_int, _COUNT),
    "global_scaling_weight": Honoured(1.0, is_number, "a finite number"),
    "scaling_pass_value": Honoured(0.0, lambda v: is_number(v) and v == 0, "0", Reason.UNSUPPORTED_FIELD),
    "use_trainable_adapters": NoEffect("training only"),
}


@dataclass(frozen=True, slots=True)
class _SitePlan:
    """Of each expert, its A and B; None where it has nothing here."""

    pairs: tuple[tuple[str, str] | None, ...]
    ranks: tuple[int, ...]


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and every tensor's name and shape against the base."""
    fields = _fields(config, base)
    ledger, experts = Ledger(shapes), len(fields["adapters"])
    sites = {name: _plan_site(name, experts, ledger, base) for name in _sites(ledger, base)}
    layers = _plan_classifier(fields, experts, len(sites), ledger)
    if not sites:
        raise AdapterInvalid(
            Reason.MISSING_TENSOR,
            "expected the experts' tensors in this file, got none: PEFT keeps them elsewhere; make one folder of all "
            "with `peftmux adapters convert`",
        )
    ledger.close()
    _check_experts(sites, experts)
    rule = ShareRule(
        len(sites),
        experts,
        fields["enable_softmax"],
        fields["softmax_temperature"],
        fields["top_k_lora"],
        fields["enable_softmax_topk"],
        fields["global_scaling_weight"],
    )

    def build(tensors: Mapping[str, Tensor]) -> Parts:
        classifier = ClassifierPart(tuple((tensors[w], tensors[b]) for w, b in layers), rule)
        routed = {name: (_build_site(site, i, tensors),) for i, (name, site) in enumerate(sites.items())}
        return Parts(others={FIRST_PASS: (classifier,), **routed})

    return Plan("xlora", build)


def kinds(base: BaseModel) -> tuple[str, ...]:
    return ("xlora",) if base.shows_hidden_state else ()


def classifier_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Where PEFT puts the classifier's linear layers: ReLU, and dropout where there is any, stand between them."""
    fields = read_fields(config, FIELDS)
    dropout = config.get("xlora_dropout_p")
    step = 2 if dropout == 0 and dropout is not None else 3
    return tuple(step * i for i in range(fields["xlora_depth"]))


def _fields(config: Mapping[str, Any], base: BaseModel) -> dict[str, Any]:
    fields = read_fields(config, FIELDS)
    fields["enable_softmax"] = config.get("enable_softmax") is not False  # the one whose default is true
    if not fields["adapters"]:
        raise AdapterInvalid(Reason.INVALID_FIELD, "field adapters: expected an entry for each expert, got none")
    if fields["hidden_size"] not in (None, base.hidden_size):
        raise AdapterInvalid(
            Reason.SHAPE_MISMATCH,
            f"field hidden_size: expected {base.hidden_size} for this base, got {fields['hidden_size']}",
        )
    if fields["top_k_lora"] is not None and fields["top_k_lora"] > len(fields["adapters"]):
        raise AdapterInvalid(
            Reason.INVALID_FIELD,
            f"field top_k_lora: expected at most the {len(fields['adapters'])} experts, got {fields['top_k_lora']}",
        )
    if not base.shows_hidden_state:
        raise AdapterInvalid(
            Reason.UNSUPPORTED_SITE,
            f"X-LoRA needs the last hidden state, which {base.architecture} does not show as such",
        )
    return {**fields, "classifier": classifier_layers(config)}


def _sites(ledger: Ledger, base: BaseModel) -> list[str]:
    """Those with tensors, in the order of the base's modules: the classifier's order of layers."""
    named = {name[len(PREFIX) :].partition(".experts.")[0] for name in ledger.unclaimed() if name.startswith(PREFIX)}
    order = {name.removesuffix(".weight"): i for i, name in enumerate(base.parameter_names)}
    for name in sorted(named):
        if name not in base.linear_sites or name == base.head:
            known = name in base.module_names
            raise AdapterInvalid(
                Reason.UNSUPPORTED_SITE if known else Reason.UNKNOWN_SITE,
                f"expected experts of linear layers that are served in {base.architecture}, but {name} is "
                + ("another kind of module" if known else "not in this base"),
            )
    return sorted(named, key=lambda name: order[name])


def _plan_site(name: str, experts: int, ledger: Ledger, base: BaseModel) -> _SitePlan:
    site = base.linear_sites[name]
    pairs: list[tuple[str, str] | None] = []
    ranks = []
    for expert in range(experts):
        a, b = (f"{PREFIX}{name}.experts.{expert}.lora_{matrix}.weight" for matrix in "AB")
        if a not in ledger and b not in ledger:
            pairs.append(None)
            ranks.append(0)
            continue
        rank = ledger.claim(a, (None, site.in_features))[0]
        ledger.claim(b, (site.out_features, rank))
        pairs.append((a, b))
        ranks.append(rank)
    return _SitePlan(tuple(pairs), tuple(ranks))


def _check_experts(sites: Mapping[str, _SitePlan], experts: int) -> None:
    """An expert may leave sites alone, not all of them."""
    for expert in range(experts):
        if not any(site.ranks[expert] for site in sites.values()):
            raise AdapterInvalid(
                Reason.MISSING_TENSOR, f"expected tensors of each of the {experts} experts, got none of expert {expert}"
            )


def _plan_classifier(fields: Mapping[str, Any], experts: int, sites: int, ledger: Ledger) -> list[tuple[str, str]]:
    width: int | None = fields["hidden_size"]
    numbers = fields["classifier"]
    layers = []
    for number in numbers:
        last = number == numbers[-1]
        answers = experts * (sites or 1) if fields["layerwise_scalings"] else experts
        rows = (answers if sites or not fields["layerwise_scalings"] else None) if last else fields["xlora_size"]
        weight, bias = f"{CLASSIFIER}{number}.weight", f"{CLASSIFIER}{number}.bias"
        got = ledger.claim(weight, (rows, width))
        ledger.claim(bias, got[:1])
        layers.append((weight, bias))
        width = got[0]
    return layers


def _build_site(site: _SitePlan, layer: int, tensors: Mapping[str, Tensor]) -> RoutedPart:
    present = [pair for pair in site.pairs if pair]
    return RoutedPart(
        torch.cat([tensors[a] for a, _ in present]), torch.cat([tensors[b] for _, b in present], 1), site.ranks, layer
    )


METHOD = Method("XLORA", plan, kinds)
