"""What the files of LoRAMoE and MixLoRA share: config fields, and tensors by expert.

`adapter_config.json` has `r` and `lora_alpha` of ONE expert (and of the plain LoRAs beside them; `expert_lora` may
give the experts their own), `num_experts` and `target_modules`. A linear layer with experts has, for each expert K,
`experts.K.lora_A.weight` [r, in] and `experts.K.lora_B.weight` [out, r]; one without is a plain LoRA, `lora_A.weight`
and `lora_B.weight`. Before that stands `base_model.model.` and the layer's path, as in PEFT's files, or
`loramoe.layers.N.mlp.down_proj.` (`mixlora.`), as MoE-PEFT writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftmux.adapters import targets
from peftmux.adapters.base import BaseModel, LinearSite
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
from peftmux.adapters.methods.lora import lora_scaling
from peftmux.adapters.methods.lora_linear import claim_low_rank
from peftmux.adapters.parts import LinearPart
from peftmux.adapters.patterns import PatternMatcher

ROUTER = "moe_gate.weight"
MAX_EXPERTS = 256

_SIZES: FieldTable = {
    "r": Honoured(8, is_positive_int, "a positive integer"),
    "lora_alpha": Honoured(8, is_number, "a finite number"),
    "use_rslora": Honoured(False, is_true, "true or false"),
    "lora_dropout": NoEffect("training only"),
}
FIELDS: FieldTable = {
    **COMMON,
    **targets.FIELDS,
    **_SIZES,
    "num_experts": Honoured(
        None, lambda v: is_positive_int(v) and v <= MAX_EXPERTS, f"a positive integer of at most {MAX_EXPERTS}"
    ),
    "expert_lora": Honoured(None, lambda v: isinstance(v, dict), "an object"),
    "bias": Honoured("none", lambda v: v == "none", "none", Reason.UNSUPPORTED_FIELD),
    "fan_in_fan_out": NoEffect("A and B are stored the same way for Linear and Conv1D; the base says which it has"),
    "router_init_range": NoEffect("initialisation"),
    "router_aux_loss_coef": NoEffect("training only"),
    "router_loss": NoEffect("training only"),
    "jitter_noise": NoEffect("training only"),
    "init_lora_weights": NoEffect("initialisation: no value of it changes the base here"),
    "lora_init": NoEffect("initialisation"),
}
_EXPERT_FIELDS: FieldTable = {
    **_SIZES,
    "bias": FIELDS["bias"],
    "task_type": NoEffect("a copy"),
    "base_model_name_or_path": NoEffect("a copy"),
    "lora_init": NoEffect("initialisation"),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one low-rank pair."""

    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class Mixture:
    """A config, read: what it targets and how large its pairs are."""

    fields: Mapping[str, Any]
    sites: tuple[str, ...]
    experts: int
    plain: Sizes
    expert: Sizes


@dataclass(frozen=True, slots=True)
class Pair:
    """The tensors of one low-rank pair."""

    a: str
    b: str


def read_mixture(
    config: Mapping[str, Any], table: FieldTable, ledger: Ledger, base: BaseModel, tag: str
) -> tuple[Mixture, Names]:
    """Raises AdapterInvalid. `tag` is what MoE-PEFT's names begin with."""
    fields = read_fields(_listed(config), table)
    if fields["num_experts"] is None:
        raise AdapterInvalid(Reason.INVALID_FIELD, "field num_experts: expected a positive integer, got nothing")
    names = Names(tag if any(name.startswith(f"{tag}.") for name in ledger.unclaimed()) else None)
    if fields["target_modules"] is None:
        raise AdapterInvalid(Reason.INVALID_FIELD, "field target_modules: expected module names, got nothing")
    sites = targets.target_sites(fields, (), base, PatternMatcher())
    return Mixture(fields, tuple(sites), fields["num_experts"], _sizes(fields), _expert_sizes(fields)), names


class Names:
    """How the tensors of a linear layer or a feed-forward block are named in the files at hand."""

    def __init__(self, tag: str | None) -> None:
        self._tag = tag

    def stem(self, module: str) -> str:
        if self._tag is None:
            return PREFIX + module
        return f"{self._tag}.layers.{module.rpartition('layers.')[2]}"

    def pair(self, module: str, expert: int | None = None) -> Pair:
        own = self.stem(module) + ("" if expert is None else f".experts.{expert}")
        return Pair(f"{own}.lora_A.weight", f"{own}.lora_B.weight")

    def router(self, module: str) -> str:
        return f"{self.stem(module)}.{ROUTER}"


def claim_pair(ledger: Ledger, pair: Pair, site: LinearSite, rank: int) -> Pair:
    claim_low_rank(ledger, (pair.a, site.in_features), (pair.b, site.out_features), rank, site.name)
    return pair


def plain_part(pair: Pair, sizes: Sizes, tensors: Mapping[str, Tensor]) -> LinearPart:
    return LinearPart(tensors[pair.a], tensors[pair.b], sizes.scale)


def joined(pairs: tuple[Pair, ...], tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """-> A [E * r, in] and B [out, E * r], expert by expert."""
    return torch.cat([tensors[p.a] for p in pairs]), torch.cat([tensors[p.b] for p in pairs], 1)


def _sizes(fields: Mapping[str, Any]) -> Sizes:
    return Sizes(fields["r"], lora_scaling(fields["lora_alpha"], fields["r"], fields["use_rslora"]))


def _expert_sizes(fields: Mapping[str, Any]) -> Sizes:
    """`expert_lora` changes what it names; the rest is as outside."""
    own = fields["expert_lora"]
    if not own:
        return _sizes(fields)
    try:
        given = read_fields(own, _EXPERT_FIELDS)
    except AdapterInvalid as error:
        raise AdapterInvalid(error.reason, f"in field expert_lora, {error}") from None
    return _sizes({name: given[name] if name in own else fields[name] for name in ("r", "lora_alpha", "use_rslora")})


def _listed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """MoE-PEFT's own templates write target_modules as an object of true and false."""
    modules = config.get("target_modules")
    if isinstance(modules, dict) and all(isinstance(on, bool) for on in modules.values()):
        return {**config, "target_modules": [name for name, on in modules.items() if on]}
    return config
