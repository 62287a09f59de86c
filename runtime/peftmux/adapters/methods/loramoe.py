"""LoRAMoE: several LoRAs at one linear layer, weighed for each token by a router of that layer.

    y = W x + alpha / r * sum_e softmax(G x)_e B_e A_e x        G [E, in], one for each layer that has experts

Source: Dou et al., 2023, arXiv 2312.09979. Files: `peft_type` LORAMOE (`routing_strategy`, if given, "loramoe"), and
the names of `mixtures`; a layer with experts also has `<layer>.moe_gate.weight` [E, in], which tells it from the plain
LoRAs beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import FieldTable, Honoured
from peftmux.adapters.errors import Reason
from peftmux.adapters.methods import mixtures
from peftmux.adapters.methods.ledger import Ledger
from peftmux.adapters.methods.mixtures import Mixture, Names, Pair, claim_pair, joined, plain_part, read_mixture
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes
from peftmux.adapters.parts import LinearPart

__all__ = ["FIELDS", "METHOD"]

FIELDS: FieldTable = {
    **mixtures.FIELDS,
    "routing_strategy": Honoured("loramoe", lambda v: v == "loramoe", "loramoe", Reason.UNSUPPORTED_FIELD),
}


@dataclass(frozen=True, slots=True)
class _SitePlan:
    pairs: tuple[Pair, ...]
    router: str | None
    """None: a plain LoRA."""


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and every tensor's name and shape against the base."""
    ledger = Ledger(shapes)
    mixture, names = read_mixture(config, FIELDS, ledger, base, "loramoe")
    sites = {name: _plan_site(name, mixture, names, ledger, base) for name in mixture.sites}
    if not any(site.router for site in sites.values()):
        ledger.claim(names.router(mixture.sites[0]), (mixture.experts, None))
    ledger.close()

    def build(tensors: Mapping[str, Tensor]) -> Parts:
        return Parts({name: _build_site(site, mixture, tensors) for name, site in sites.items()})

    return Plan("loramoe", build)


def kinds(base: BaseModel) -> tuple[str, ...]:
    return ("loramoe",) if base.linear_sites else ()


def _plan_site(name: str, mixture: Mixture, names: Names, ledger: Ledger, base: BaseModel) -> _SitePlan:
    site, router = base.linear_sites[name], names.router(name)
    plain = names.pair(name)
    if router not in ledger and plain.a in ledger:
        return _SitePlan((claim_pair(ledger, plain, site, mixture.plain.rank),), None)
    ledger.claim(router, (mixture.experts, site.in_features))
    pairs = tuple(claim_pair(ledger, names.pair(name, e), site, mixture.expert.rank) for e in range(mixture.experts))
    return _SitePlan(pairs, router)


def _build_site(site: _SitePlan, mixture: Mixture, tensors: Mapping[str, Tensor]) -> LinearPart:
    if site.router is None:
        return plain_part(site.pairs[0], mixture.plain, tensors)
    a, b = joined(site.pairs, tensors)
    return LinearPart(a, b, mixture.expert.scale, gate=tensors[site.router])


METHOD = Method("LORAMOE", plan, kinds)
