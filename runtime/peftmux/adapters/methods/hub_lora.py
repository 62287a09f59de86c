"""LoRA and IA3 as AdapterHub's library saves them.

`<layer>.loras.<name>.lora_A` [r, in] and `.lora_B` [out, r], scale alpha / r (Hu et al., 2021, arXiv 2106.09685); with
composition_mode "scale", which needs r = 1, the layer's output times `lora_B` [out, 1] * alpha (IA3: Liu et al., 2022,
arXiv 2205.05638). Which layers have one is said by the config alone; the tensors must be exactly theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import FieldTable, Honoured, NoEffect, is_number, is_positive_int, is_texts, show
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.hub_fields import is_flag, is_layer_list, read_exact
from peftmux.adapters.methods.hub_interface import Interface
from peftmux.adapters.methods.ledger import Ledger
from peftmux.adapters.methods.registry import Parts, Plan
from peftmux.adapters.parts import LinearPart

_FLAG = "true or false"
FIELDS: FieldTable = {
    "architecture": Honoured(None, lambda v: v == "lora", "lora"),
    "alpha": Honoured(8, is_number, "a finite number"),
    "r": Honoured(8, is_positive_int, "a positive integer"),
    "composition_mode": Honoured("add", lambda v: v in ("add", "scale"), "add or scale"),
    "leave_out": Honoured([], is_layer_list, "a list of layer numbers"),
    "attn_matrices": Honoured(["q", "v"], lambda v: is_texts(v) and set(v) <= set("qkv"), "a list of q, k and v"),
    "selfattn_lora": Honoured(True, is_flag, _FLAG),
    "intermediate_lora": Honoured(False, is_flag, _FLAG),
    "output_lora": Honoured(False, is_flag, _FLAG),
    **{name: NoEffect("training only") for name in ("dropout", "init_weights", "init_weights_seed", "dtype")},
}
_BLOCK = re.compile(r"(?:.*?\.)?(\d+)\.(.+)")
_VERSION = re.compile(r"adapters\.(\d+)\.(\d+)(?:\.\d+)*")
_SCALED = (1, 1)
"""Since this version the library trains with the scale that it writes."""


def plan_hub_lora(
    name: str, config: Mapping[str, Any], version: str | None, interface: Interface, ledger: Ledger, base: BaseModel
) -> Plan:
    """Check the config and claim all of its tensors. version: of the library that wrote it, as it wrote it."""
    fields = read_exact(config, FIELDS)
    adds, rank = fields["composition_mode"] == "add", fields["r"]
    if not adds and rank != 1:
        raise AdapterInvalid(Reason.INVALID_FIELD, f"field r: expected 1 with composition_mode scale, got {rank}")
    sites = _sites(name, ledger, base)
    _check_sites(fields, sites, interface, base)
    for tensor, site in sites.items():
        found = base.linear_sites[site]
        ledger.claim(tensor, (found.out_features, rank))
        if adds:
            ledger.claim(_other(tensor), (rank, found.in_features))
    scale = _alpha(fields, version) / rank

    def build(tensors: Mapping[str, Tensor]) -> Parts:
        if adds:
            return Parts({s: LinearPart(tensors[_other(b)], tensors[b], scale) for b, s in sites.items()})
        return Parts({s: LinearPart(out_scale=tensors[b].flatten() * scale) for b, s in sites.items()})

    return Plan("lora" if adds else "ia3", build)


def _other(tensor: str) -> str:
    return tensor.removesuffix("lora_B") + "lora_A"


def _alpha(fields: Mapping[str, Any], version: str | None) -> float:
    """Older versions trained without a scale and wrote alpha nevertheless: the library then reads r for it."""
    alpha, rank = fields["alpha"], fields["r"]
    if alpha == rank or version is None or not version.startswith("adapters."):
        return float(alpha)
    numbers = _VERSION.fullmatch(version)
    if numbers is None:
        raise AdapterInvalid(
            Reason.INVALID_FIELD,
            f"field version: expected such as adapters.1.3.0 where alpha is not r, got {version!r}",
        )
    return float(alpha if (int(numbers[1]), int(numbers[2])) >= _SCALED else rank)


def _sites(name: str, ledger: Ledger, base: BaseModel) -> dict[str, str]:
    """The layer of each tensor lora_B."""
    prefix, suffix = f"adapter/{name}/", f".loras.{name}.lora_B"
    sites = {}
    for tensor in ledger.unclaimed():
        if tensor.startswith(prefix) and tensor.endswith(suffix):
            sites[tensor] = tensor[len(prefix) : -len(suffix)]
            if sites[tensor] not in base.linear_sites:
                raise AdapterInvalid(
                    Reason.UNKNOWN_SITE,
                    f"tensor {tensor}: expected a linear layer of {base.architecture} that is served",
                )
    return sites


def _check_sites(fields: Mapping[str, Any], sites: Mapping[str, str], interface: Interface, base: BaseModel) -> None:
    """One layer for each role that the config names, in every block that `leave_out` does not name."""
    wanted = _wanted(fields)
    if not wanted:
        raise AdapterInvalid(
            Reason.NO_SITES, "expected attn_matrices, intermediate_lora or output_lora to name a layer, got none"
        )
    left_out = fields["leave_out"] or []
    missing = {(block, role) for block in range(len(base.kv_shapes)) if block not in left_out for role in wanted}
    for tensor, site in sites.items():
        place = _BLOCK.fullmatch(site)
        roles = interface.roles(place[2]) if place else ""
        if not place or not roles:
            raise AdapterInvalid(
                Reason.UNKNOWN_SITE,
                f"tensor {tensor}: expected a layer that selfattn_lora, intermediate_lora or "
                f"output_lora can name, got {site}",
            )
        for role in roles:
            if (int(place[1]), role) not in missing:
                raise AdapterInvalid(
                    Reason.UNUSED_TENSOR,
                    f"tensor {tensor}: expected none, because {_named(role, fields)} and "
                    f"leave_out {show(left_out)} leave it unused",
                )
            missing.remove((int(place[1]), role))
    if missing:
        block, role = min(missing)
        raise AdapterInvalid(
            Reason.MISSING_TENSOR, f"expected tensors for {_named(role, fields)} in block {block}, which are missing"
        )


def _wanted(fields: Mapping[str, Any]) -> set[str]:
    """The roles: the letters of the attention's projections, "i" and "o" of the feed-forward's."""
    attention = fields["attn_matrices"] if fields["selfattn_lora"] else []
    return {*attention, *("i" if fields["intermediate_lora"] else ""), *("o" if fields["output_lora"] else "")}


def _named(role: str, fields: Mapping[str, Any]) -> str:
    """The fields that say whether a role has tensors, as they are."""
    names = {"i": ("intermediate_lora",), "o": ("output_lora",)}.get(role, ("selfattn_lora", "attn_matrices"))
    return " and ".join(f"{name} {fields[name]}" for name in names)
