"""What AdapterHub's library saves: bottlenecks, fusions of them, its LoRA, IA3, prefixes and heads. See `adapters.hub`.

Its LoRA: `<layer>.loras.<name>.lora_A` [r, in], `.lora_B` [out, r], scale alpha / r; with composition_mode "scale" (its
IA3) the layer's output times `lora_B` [out, 1] * alpha / r. Fusion: `<layer>.*_adapters.adapter_fusion_layer.*`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import FieldTable, Honoured, NoEffect, is_layers, is_number, is_positive_int, read_fields
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.hub import PEFT_TYPE
from peftmux.adapters.methods.bottleneck import PLACES, BottleneckPlan, kind_of, plan_bottlenecks
from peftmux.adapters.methods.hub_prefix import plan_hub_prefix
from peftmux.adapters.methods.ledger import Ledger
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes
from peftmux.adapters.parts import Fusion, LinearPart, Part, ReplacedRows

if TYPE_CHECKING:
    from peftmux.adapters.heads import HeadPlan

_LORA: FieldTable = {
    "architecture": Honoured(None, lambda v: v == "lora", "lora"),
    "alpha": Honoured(8, is_number, "a finite number"),
    "r": Honoured(8, is_positive_int, "a positive integer"),
    "composition_mode": Honoured("add", lambda v: v in ("add", "scale"), "add or scale"),
    "leave_out": Honoured([], is_layers, "a list of layer numbers"),
    "attn_matrices": Honoured(None, lambda v: set(v) <= {"q", "k", "v"}, "a list of q, k and v"),
    "selfattn_lora": Honoured(False, lambda v: v is True, "true or false"),
    **{name: NoEffect("which layers have one is in the tensors") for name in ("intermediate_lora", "output_lora")},
    **{name: NoEffect("training only") for name in ("dropout", "init_weights", "init_weights_seed", "dtype")},
}
_ON = ("key", "query", "value", "value_before_softmax")
_FUSION: FieldTable = {
    **{name: Honoured(False, lambda v: v is True, "true") for name in _ON},
    **{name: NoEffect("training only") for name in ("dropout_prob", "regularization", "value_initialized")},
}


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the configs and every tensor's name and shape against the base."""
    adapters, heads, fusion = (config.get(name) for name in ("adapters", "heads", "fusion"))
    if not isinstance(adapters, dict) or not isinstance(heads, dict) or not adapters:
        raise AdapterInvalid(Reason.MALFORMED_CONFIG, f"{PEFT_TYPE} is the name of AdapterHub's folders, not of a file")
    ledger = Ledger(shapes)
    inner = {name: _inner(name, adapter) for name, adapter in adapters.items()}
    head, lm_heads = _plan_heads(heads, shapes, ledger, base)
    if fusion is not None:
        found = _plan_fusion(fusion, inner, ledger, base)
    else:
        ((name, own),) = inner.items()
        found = _plan_one(name, own, ledger, base)
    ledger.close()

    def build(tensors: Mapping[str, Tensor]) -> Parts:
        parts = found.build(tensors)
        others: dict[str, tuple[Part, ...]] = dict(parts.others)
        for name in lm_heads:
            others |= _language_head(tensors[name], base)
        return dataclasses.replace(parts, others=others, head=head.build(_head_tensors(tensors)) if head else None)

    return Plan(found.kind, build)


def _inner(name: str, adapter: Any) -> Mapping[str, Any]:
    own = adapter.get("config") if isinstance(adapter, dict) else None
    if not isinstance(own, dict):
        raise AdapterInvalid(Reason.MALFORMED_CONFIG, f"adapter {name}: expected a config, got none")
    return own


def _plan_one(name: str, config: Mapping[str, Any], ledger: Ledger, base: BaseModel) -> Plan:
    architecture = config.get("architecture")
    if architecture == "lora":
        return _plan_lora(name, config, ledger, base)
    if architecture == "prefix_tuning":
        return plan_hub_prefix(name, config, ledger, base)
    if architecture is not None:
        several = " (several methods in one, such as MAM and UniPELT)" if architecture == "union" else ""
        raise AdapterInvalid(
            Reason.UNSUPPORTED_METHOD,
            "field architecture: expected a bottleneck, lora or prefix_tuning, "
            f"got {str(architecture)[:80]!r}{several}, which is not served",
        )
    plans = plan_bottlenecks(config, name, f"adapter/{name}/", ledger, base)
    return Plan(kind_of(config), partial(_build_bottlenecks, plans))


def _build_bottlenecks(plans: Mapping[str, BottleneckPlan], tensors: Mapping[str, Tensor]) -> Parts:
    return Parts(others={branch: (plan.build(tensors),) for branch, plan in plans.items()})


def _plan_lora(name: str, config: Mapping[str, Any], ledger: Ledger, base: BaseModel) -> Plan:
    fields = read_fields(config, _LORA)
    adds, prefix, suffix = fields["composition_mode"] == "add", f"adapter/{name}/", f".loras.{name}.lora_B"
    sites = {}
    for tensor in ledger.unclaimed():
        if not (tensor.startswith(prefix) and tensor.endswith(suffix)):
            continue
        site = base.linear_sites.get(tensor[len(prefix) : -len(suffix)])
        if site is None:
            raise AdapterInvalid(
                Reason.UNKNOWN_SITE, f"tensor {tensor}: expected a linear layer of {base.architecture} that is served"
            )
        rank = fields["r"]
        ledger.claim(tensor, (site.out_features, rank if adds else 1))
        if adds:
            ledger.claim(tensor.replace("lora_B", "lora_A"), (rank, site.in_features))
        sites[site.name] = tensor
    _check_every_layer(fields, sites, base)
    scale = fields["alpha"] / fields["r"]

    def build(tensors: Mapping[str, Tensor]) -> Parts:
        if adds:
            pairs = {s: (tensors[b.replace("lora_B", "lora_A")], tensors[b]) for s, b in sites.items()}
            return Parts({site: LinearPart(a, b, scale) for site, (a, b) in pairs.items()})
        return Parts({site: LinearPart(out_scale=tensors[b].flatten() * scale) for site, b in sites.items()})

    return Plan("lora" if adds else "ia3", build)


def _check_every_layer(fields: Mapping[str, Any], sites: Collection[str], base: BaseModel) -> None:
    """The same layers in every block that `leave_out` does not name, those of attn_matrices among them."""
    left_out = fields["leave_out"] if isinstance(fields["leave_out"], list) else [fields["leave_out"]]
    blocks: dict[int, set[str]] = {i: set() for i in range(len(base.kv_shapes)) if i not in left_out}
    for site in sites:
        numbers = [int(part) for part in site.split(".") if part.isdigit()]
        if not numbers or numbers[0] not in blocks:
            raise AdapterInvalid(Reason.UNUSED_TENSOR, f"expected no tensors at {site}, which leave_out names")
        blocks[numbers[0]].add(site.split(f".{numbers[0]}.", 1)[1])
    wanted = set().union(*blocks.values())
    if not wanted:
        raise AdapterInvalid(Reason.NO_SITES, "expected LoRA tensors, got none")
    for block, found in blocks.items():
        if missing := sorted(wanted - found):
            raise AdapterInvalid(
                Reason.MISSING_TENSOR, f"expected tensors at {missing[0]} of block {block}, as in others"
            )
    for letter in (fields["attn_matrices"] or ()) if fields["selfattn_lora"] else ():
        if not any(name.endswith((f"{letter}_proj", "c_attn", "qkv_proj")) for name in wanted):
            raise AdapterInvalid(Reason.MISSING_TENSOR, f"field attn_matrices: expected tensors of {letter}, got none")


def _plan_fusion(fusion: Any, inner: Mapping[str, Mapping[str, Any]], ledger: Ledger, base: BaseModel) -> Plan:
    fields = read_fields(fusion.get("config") or {}, _FUSION)
    for name in _ON:
        if not fields[name]:
            raise AdapterInvalid(Reason.UNSUPPORTED_FIELD, f"field {name} of the fusion: expected true, got false")
    plans = {name: plan_bottlenecks(own, name, f"adapter/{name}/", ledger, base) for name, own in inner.items()}
    branches = next(iter(plans.values())).keys()
    if any(own.keys() != branches for own in plans.values()):
        raise AdapterInvalid(Reason.UNSUPPORTED_FIELD, "expected fused adapters at the same branches")
    reads = {plan.reads for own in plans.values() for plan in own.values()}
    if len(reads) > 1:
        raise AdapterInvalid(Reason.UNSUPPORTED_FIELD, f"expected fused adapters to read the same, got {sorted(reads)}")
    stems = {branch: _claim_fusion(branch, ",".join(inner), ledger, base) for branch in branches}

    def build(tensors: Mapping[str, Tensor]) -> Parts:
        fused = {}
        for branch, stem in stems.items():
            own = tuple(plan[branch].build(tensors) for plan in plans.values())
            names = ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight")
            query, query_bias, key, key_bias, value = (tensors[stem + name] for name in names)
            fused[branch] = (Fusion(own, query, query_bias, key, key_bias, value),)
        return Parts(others=fused)

    return Plan("fusion", build)


def _claim_fusion(branch: str, names: str, ledger: Ledger, base: BaseModel) -> str:
    found, width = base.branches[branch], base.state_width
    stem = f"fusion/{branch.rpartition('.')[0]}.{PLACES[found.role]}.adapter_fusion_layer.{names}."
    for name in ("query", "key", "value"):
        ledger.claim(f"{stem}{name}.weight", (width, width))
        if name != "value":
            ledger.claim(f"{stem}{name}.bias", (width,))
    return stem


def _plan_heads(
    heads: Mapping[str, Any], shapes: Shapes, ledger: Ledger, base: BaseModel
) -> tuple[HeadPlan | None, list[str]]:
    """A classification head, and the tensors of language-model heads, which AdapterHub saves beside every adapter."""
    from peftmux.adapters.heads import plan_hub_head  # which reads this package's ledger

    plan, language = None, []
    for name, head in heads.items():
        prefix = f"head/{name}/"
        own = {tensor[len(prefix) :]: shape for tensor, shape in shapes.items() if tensor.startswith(prefix)}
        config = head.get("config")
        if isinstance(config, dict):
            plan = plan_hub_head(config, name, own, base)
            for tensor in own:
                ledger.claim(prefix + tensor, shapes[prefix + tensor])
        elif own:
            site = base.linear_sites[base.head] if base.head else None
            if site is None:
                raise AdapterInvalid(Reason.UNSUPPORTED_SITE, "expected a base with an output projection for the head")
            ledger.claim(f"{prefix}{base.head}.weight", (site.out_features, site.in_features))
            language.append(f"{prefix}{base.head}.weight")
    return plan, language


def _head_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.split("/", 2)[2]: tensor for name, tensor in tensors.items() if name.startswith("head/")}


def _language_head(weight: Tensor, base: BaseModel) -> dict[str, tuple[Part, ...]]:
    """Nothing where it is the base's own, which it is unless it was trained."""
    assert base.head is not None
    own = base.weight(base.head)
    if torch.equal(weight.to(own.device, own.dtype), own):
        return {}
    return {base.head: (ReplacedRows(weight, None, base.bias(base.head)),)}


def kinds(base: BaseModel) -> tuple[str, ...]:
    return ("houlsby", "pfeiffer", "parallel", "bottleneck", "fusion") if base.branches else ()


METHOD = Method(PEFT_TYPE, plan, kinds)
