"""AdaLoRA: W + s P Lambda Q with a rank of its own at every layer, some of them zero.

    y = W x + lora_alpha / (init_r + 1e-5) * lora_B (lora_E * (lora_A x))

Source: Zhang et al., 2023, arXiv 2303.10512. PEFT saves `<layer>.lora_A` [k, in], `.lora_E` [k, 1] and `.lora_B`
[out, k], pruned to the k that `rank_pattern` keeps; the scale keeps init_r. With lora_alpha <= 0 it is k / init_r.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import FieldTable, Honoured, NoEffect, is_number, is_positive_int
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.methods import targeted
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes
from peftmux.adapters.parts import LinearPart

_EPSILON = 1e-5
"""PEFT adds it to init_r."""


def _is_masks(value: Any) -> bool:
    masks = value.values() if isinstance(value, dict) else [None]
    return all(isinstance(mask, list) and all(type(kept) is bool for kept in mask) for mask in masks)


FIELDS: FieldTable = {
    **targeted.FIELDS,
    "init_r": Honoured(12, is_positive_int, "a positive integer"),
    "lora_alpha": Honoured(8, is_number, "a finite number"),
    "rank_pattern": Honoured({}, _is_masks, "an object of lists of true and false"),
    "bias": Honoured("none", lambda v: v == "none", "none", Reason.UNSUPPORTED_FIELD),
    "r": NoEffect("PEFT ignores it: init_r counts"),
    "fan_in_fan_out": NoEffect("A and B are stored the same way for Linear and Conv1D; the base says which it has"),
    "init_lora_weights": NoEffect("initialisation"),
    "loftq_config": NoEffect("initialisation"),
    "megatron_core": NoEffect("only read with megatron_config, which is not served"),
    "qalora_group_size": NoEffect("only read with use_qalora, which is not served"),
    **{
        name: NoEffect("training only")
        for name in ("lora_dropout", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")
    },
    "total_step": NoEffect("training only"),
}


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and every tensor's name and shape against the base."""
    found = targeted.read_targeted(config, FIELDS, shapes, base, ("lora_A", "lora_B", "lora_E"))
    fields, ranks = found.fields, {}
    for site in found.sites:
        rank = _rank(fields, site.name)
        a, b, e = found.stem(site, "lora_A", "lora_B", "lora_E")
        for name, shape in ((a, (rank, site.in_features)), (b, (site.out_features, rank)), (e, (rank, 1))):
            found.ledger.claim(name, shape)
        ranks[site.name] = rank

    def build(tensors: Mapping[str, Tensor]) -> Parts:
        linear = {}
        for site in found.sites:
            a, b, e = (tensors[name] for name in found.stem(site, "lora_A", "lora_B", "lora_E"))
            if rank := ranks[site.name]:
                alpha = fields["lora_alpha"] if fields["lora_alpha"] > 0 else rank
                linear[site.name] = triplets(a, e, b, alpha, fields["init_r"])
        return Parts(linear)

    return found.finish("adalora", build)


def triplets(a: Tensor, e: Tensor, b: Tensor, alpha: float, init_r: int) -> LinearPart:
    """The definition above, for alpha > 0. a: [k, in], e: [k, 1], b: [out, k]. Differentiable."""
    return LinearPart(a * e, b, alpha / (init_r + _EPSILON))


def _rank(fields: Mapping[str, Any], site: str) -> int:
    """What the pattern keeps of init_r, all of it where the pattern does not name the layer."""
    mask = fields["rank_pattern"].get(f"{site}.lora_E")
    if mask is None:
        return int(fields["init_r"])
    if len(mask) != fields["init_r"]:
        raise AdapterInvalid(
            Reason.RANK_MISMATCH,
            f"field rank_pattern: expected {fields['init_r']} entries for {site}, as init_r says, got {len(mask)}",
        )
    return sum(mask)


METHOD = Method("ADALORA", plan, lambda base: ("adalora",) if base.linear_sites else ())
