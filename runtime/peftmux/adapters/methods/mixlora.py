"""MixLoRA: several low-rank variants of the whole feed-forward block, of which a router chooses some for each token.

    FFN(x) = sum over the k largest of softmax(R x), renormalised, of  w_e * FFN_e(x);   FFN_e has W + alpha / r B_e A_e

with the router in float32, and plain LoRA at attention projections beside it.

Source: Li et al., 2024, arXiv 2404.15159. Files: `peft_type` MIXLORA, `routing_strategy` "mixlora" and the names of
`mixtures`, as MoE-PEFT writes them: a block's router is `mixlora.layers.N.mlp.moe_gate.weight` [E, D], its variants are
`mixlora.layers.N.mlp.gate_proj.experts.K.lora_A.weight` and so on, attention has
`mixlora.layers.N.self_attn.q_proj.lora_A.weight`. `base_model.model.` and the module's path may stand in front instead.
MoE-PEFT's own adapter_model.bin is a pickle: `peftmux adapters convert` keeps the names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftmux.adapters.base import BaseModel, FeedForwardSite
from peftmux.adapters.config import FieldTable, Honoured, is_positive_int
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.methods import mixtures
from peftmux.adapters.methods.ledger import Ledger
from peftmux.adapters.methods.mixtures import Mixture, Names, Pair, claim_pair, plain_part, read_mixture
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes
from peftmux.adapters.parts import ExpertsPart, MixturePart

__all__ = ["FIELDS", "METHOD"]

FIELDS: FieldTable = {
    **mixtures.FIELDS,
    "routing_strategy": Honoured("mixlora", lambda v: v == "mixlora", "mixlora", Reason.UNSUPPORTED_FIELD),
    "top_k": Honoured(2, is_positive_int, "a positive integer"),
}


@dataclass(frozen=True, slots=True)
class _BlockPlan:
    router: str
    experts: Mapping[str, tuple[Pair, ...]]
    """By projection, one for each expert."""


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and every tensor's name and shape against the base."""
    ledger = Ledger(shapes)
    mixture, names = read_mixture(config, FIELDS, ledger, base, "mixlora")
    if mixture.fields["top_k"] > mixture.experts:
        raise AdapterInvalid(
            Reason.INVALID_FIELD,
            f"field top_k: expected at most the {mixture.experts} experts, got {mixture.fields['top_k']}",
        )
    inside, plain = _split_sites(mixture.sites, base)
    blocks = {
        name: _plan_block(base.feed_forwards[name], own, mixture, names, ledger, base) for name, own in inside.items()
    }
    loras = {s: claim_pair(ledger, names.pair(s), base.linear_sites[s], mixture.plain.rank) for s in plain}
    ledger.close()

    def build(tensors: Mapping[str, Tensor]) -> Parts:
        return Parts(
            {site: plain_part(pair, mixture.plain, tensors) for site, pair in loras.items()},
            {name: (_build_block(block, mixture, tensors),) for name, block in blocks.items()},
        )

    return Plan("mixlora", build)


def kinds(base: BaseModel) -> tuple[str, ...]:
    return ("mixlora",) if base.feed_forwards else ()


def _split_sites(sites: Sequence[str], base: BaseModel) -> tuple[dict[str, list[str]], list[str]]:
    """-> the targeted projections of each feed-forward block, and the linear layers outside of them."""
    inside: dict[str, list[str]] = {}
    plain = []
    for site in sites:
        block, _, projection = site.rpartition(".")
        if block in base.feed_forwards:
            inside.setdefault(block, []).append(projection)
        else:
            plain.append(site)
    if not inside:
        raise AdapterInvalid(
            Reason.NO_SITES,
            f"field target_modules: expected projections of a feed-forward block that is served in "
            f"{base.architecture}, got {', '.join(sites[:3])}",
        )
    return inside, plain


def _plan_block(
    block: FeedForwardSite, projections: Sequence[str], mixture: Mixture, names: Names, ledger: Ledger, base: BaseModel
) -> _BlockPlan:
    router = names.router(block.name)
    ledger.claim(router, (mixture.experts, base.linear_sites[f"{block.name}.{block.inner[0]}"].in_features))
    experts = {}
    for projection in projections:
        site = base.linear_sites[f"{block.name}.{projection}"]
        experts[projection] = tuple(
            claim_pair(ledger, names.pair(site.name, e), site, mixture.expert.rank) for e in range(mixture.experts)
        )
    return _BlockPlan(router, experts)


def _build_block(block: _BlockPlan, mixture: Mixture, tensors: Mapping[str, Tensor]) -> MixturePart:
    experts = {
        projection: ExpertsPart(
            torch.stack([tensors[pair.a] for pair in pairs]),
            torch.stack([tensors[pair.b] for pair in pairs]),
            mixture.expert.scale,
        )
        for projection, pairs in block.experts.items()
    }
    return MixturePart(tensors[block.router], mixture.fields["top_k"], experts)


METHOD = Method("MIXLORA", plan, kinds)
