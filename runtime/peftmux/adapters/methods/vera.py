"""VeRA: one pair of random projections for all layers, scaled by two trained vectors at each.

    y = W x + lambda_b * (B[:out] (lambda_d * (A[:, :in] x)))

Source: Kopiczko et al., 2023, arXiv 2310.11454. PEFT saves `<layer>.vera_lambda_b` [out] and `.vera_lambda_d` [r], and
with save_projection `base_model.vera_A` [r, widest in], `base_model.vera_B` [widest out, r]; otherwise both are drawn
again from `projection_prng_key` (Kaiming uniform, A before B, torch's generator on the CPU).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import FieldTable, Honoured, NoEffect, is_positive_int
from peftmux.adapters.errors import Reason
from peftmux.adapters.methods import targeted
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes
from peftmux.adapters.parts import LinearPart

_A, _B = "base_model.vera_A", "base_model.vera_B"
FIELDS: FieldTable = {
    **targeted.FIELDS,
    "r": Honoured(256, is_positive_int, "a positive integer"),
    "projection_prng_key": Honoured(0, lambda v: type(v) is int and 0 <= v < 1 << 63, "a natural number"),
    "save_projection": Honoured(False, lambda v: v is True, "true or false"),
    "bias": Honoured("none", lambda v: v == "none", "none", Reason.UNSUPPORTED_FIELD),
    "vera_dropout": NoEffect("training only"),
    "d_initial": NoEffect("initialisation"),
    "init_weights": NoEffect("initialisation"),
    "fan_in_fan_out": NoEffect("lambdas and projections are stored the same way for Linear and Conv1D"),
}


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and every tensor's name and shape against the base."""
    found = targeted.read_targeted(config, FIELDS, shapes, base, ("vera_lambda_b", "vera_lambda_d"))
    rank = found.fields["r"]
    wide = max(site.in_features for site in found.sites)
    tall = max(site.out_features for site in found.sites)
    saved = found.fields["save_projection"]
    if saved:
        found.ledger.claim(_A, (rank, wide))
        found.ledger.claim(_B, (tall, rank))
    for site in found.sites:
        b, d = found.stem(site, "vera_lambda_b", "vera_lambda_d")
        found.ledger.claim(b, (site.out_features,))
        found.ledger.claim(d, (rank,))

    def build(tensors: Mapping[str, Tensor]) -> Parts:
        key = found.fields["projection_prng_key"]
        a, b = (tensors[_A], tensors[_B]) if saved else projections(rank, wide, tall, key)
        linear = {}
        for site in found.sites:
            by_out, by_rank = (tensors[n] for n in found.stem(site, "vera_lambda_b", "vera_lambda_d"))
            linear[site.name] = LinearPart(
                by_rank[:, None] * a[:, : site.in_features], by_out[:, None] * b[: site.out_features], 1.0
            )
        return Parts(linear)

    return found.finish("vera", build)


def projections(rank: int, wide: int, tall: int, key: int) -> tuple[Tensor, Tensor]:
    """A [rank, wide] and B [tall, rank] as PEFT draws them."""
    generator = torch.Generator().manual_seed(key)
    a = _kaiming_uniform(torch.empty(rank, wide), generator)
    return a, _kaiming_uniform(torch.empty(tall, rank), generator)


def _kaiming_uniform(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """U(-b, b) with b = sqrt(3) * sqrt(2 / fan in), the fan in being the second dimension (He et al., 2015)."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(tensor.shape[1]))
    return tensor.uniform_(-bound, bound, generator=generator)


METHOD = Method("VERA", plan, lambda base: ("vera",) if base.linear_sites else ())
