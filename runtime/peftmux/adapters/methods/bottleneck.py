"""Bottleneck adapters as AdapterHub's library saves them: which branches have one, what it reads, what it computes.

Tensors `<layer>.attention_adapters.adapters.<name>.*` (with mh_adapter) and `<layer>.output_adapters.adapters.<name>.*`
(with output_adapter), in every layer that `leave_out` does not name (AdapterDrop: Rueckle et al., 2021, arXiv
2010.11918): `adapter_down.0.weight` [m, D], `.bias`, `adapter_up.weight` [D, m], `.bias`, perhaps `scaling` and norms.

On a base without norms between a branch and the stream the library computes, for z what the adapter reads,

    A(z) + residual (+ h with original_ln_after),   z = h if is_parallel, y + h with original_ln_before, else y

of which only those forms are served that come to h + y + A(z).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftmux.adapters.base import BaseModel, ResidualBranch
from peftmux.adapters.config import FieldTable, Honoured, NoEffect, is_number, show
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.hub_fields import is_flag, is_layer_list, read_exact
from peftmux.adapters.methods.ledger import Ledger
from peftmux.kernels.bottleneck import ACTIVATIONS, Bottleneck, LayerNorm
from peftmux.kernels.bottleneck.reference import Reads

PLACES = {"attention": "attention_adapters", "feed_forward": "output_adapters"}
"""By the branch's role, what AdapterHub calls its adapters."""

_BOOL = "true or false"


def _is_factor(value: Any) -> bool:
    return is_number(value) and value >= 1e-6


def _is_factors(value: Any) -> bool:
    """One for all layers, or by layer number and for "default"."""
    return _is_factor(value) or (isinstance(value, dict) and all(map(_is_factor, value.values())))


FIELDS: FieldTable = {
    **{
        name: Honoured(False, is_flag, _BOOL)
        for name in (
            "mh_adapter",
            "output_adapter",
            "is_parallel",
            "original_ln_before",
            "adapter_residual_before_ln",
            "ln_before",
            "ln_after",
        )
    },
    "original_ln_after": Honoured(True, is_flag, _BOOL),
    "residual_before_ln": Honoured(True, is_flag, _BOOL, Reason.UNSUPPORTED_FIELD),
    "non_linearity": Honoured(
        "", lambda v: isinstance(v, str) and v.lower() in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}"
    ),
    "scaling": Honoured(1.0, lambda v: is_number(v) or v in ("learned", "channel"), "a number, learned or channel"),
    "leave_out": Honoured([], is_layer_list, "a list of layer numbers"),
    "reduction_factor": Honoured(None, _is_factors, "a positive number, or one for each layer"),
    **{
        name: NoEffect("training only") for name in ("dropout", "init_weights", "init_weights_seed", "stochastic_depth")
    },
    **{
        name: NoEffect("only read with phm_layer, which is not served")
        for name in (
            "factorized_phm_W",
            "factorized_phm_rule",
            "hypercomplex_nonlinearity",
            "learn_phm",
            "phm_bias",
            "phm_c_init",
            "phm_dim",
            "phm_init_range",
            "phm_rank",
            "shared_W_phm",
            "shared_phm_rule",
        )
    },
    "inv_adapter_reduction_factor": NoEffect("only read with inv_adapter, which is not served"),
}


@dataclass(frozen=True, slots=True)
class BottleneckPlan:
    """One branch's adapter with its tensors' names."""

    stem: str
    fields: Mapping[str, Any]
    reads: Reads

    def fused(self) -> BottleneckPlan:
        """As a fusion reads it: A(z) before a norm of its own. Raises AdapterInvalid for a parallel one."""
        if self.reads == "residual":
            raise AdapterInvalid(
                Reason.UNSUPPORTED_FIELD,
                "field is_parallel: expected false in a fusion, got true (the library adds the residual stream twice)",
            )
        return dataclasses.replace(self, fields={**self.fields, "ln_after": False})

    def build(self, tensors: Mapping[str, Tensor]) -> Bottleneck:
        fields, stem = self.fields, self.stem
        down = f"{stem}adapter_down.{1 if fields['ln_before'] else 0}"
        scale = fields["scaling"]
        learned = tensors[f"{stem}scaling"] if isinstance(scale, str) else torch.tensor([float(scale)])
        return Bottleneck(
            tensors[f"{down}.weight"],
            tensors[f"{down}.bias"],
            tensors[f"{stem}adapter_up.weight"],
            tensors[f"{stem}adapter_up.bias"],
            learned,
            str(fields["non_linearity"]).lower(),
            self.reads,
            (
                _norm(tensors, f"{stem}adapter_norm_before") if fields["ln_before"] else None,
                _norm(tensors, f"{stem}adapter_norm_after") if fields["ln_after"] else None,
            ),
        )


def plan_bottlenecks(
    config: Mapping[str, Any], name: str, prefix: str, ledger: Ledger, base: BaseModel
) -> dict[str, BottleneckPlan]:
    """By the path of the branch. `config` is the inner "config" of adapter_config.json. Claims all of its tensors."""
    fields = read_exact(config, FIELDS)
    reads = _reads(fields)
    wanted = {
        role for role, on in (("attention", fields["mh_adapter"]), ("feed_forward", fields["output_adapter"])) if on
    }
    if not wanted:
        raise AdapterInvalid(Reason.NO_SITES, "expected mh_adapter or output_adapter, got neither")
    if fields["non_linearity"] == "":
        raise AdapterInvalid(Reason.INVALID_FIELD, "field non_linearity: expected an activation, got nothing")
    left_out = fields["leave_out"] or []
    branches = [b for b in base.branches.values() if b.role in wanted and b.layer not in left_out]
    if not branches:
        raise AdapterInvalid(
            Reason.UNSUPPORTED_SITE,
            f"bottleneck adapters are not served on {base.architecture}: expected blocks that add what attention and "
            "feed-forward give, as it is, to the stream that a norm reads",
        )
    return {b.name: _claim(b, fields, reads, name, prefix, ledger, base) for b in branches}


def kind_of(config: Mapping[str, Any]) -> str:
    """The literature's name for a form, where it has one."""
    fields = read_exact(config, FIELDS)
    if fields["is_parallel"]:
        return "parallel"
    if fields["mh_adapter"] and fields["output_adapter"] and _reads(fields) == "branch":
        return "houlsby"
    if fields["output_adapter"] and not fields["mh_adapter"] and _reads(fields) == "sum":
        return "pfeiffer"
    return "bottleneck"


def _reads(fields: Mapping[str, Any]) -> Reads:
    """What the adapter reads. Refuses the forms whose sum is another."""
    before, after, own = (fields[n] for n in ("original_ln_before", "original_ln_after", "residual_before_ln"))
    served = after if fields["is_parallel"] or own else after != before
    if not served or (fields["adapter_residual_before_ln"] and fields["ln_after"]):
        raise AdapterInvalid(
            Reason.UNSUPPORTED_FIELD,
            "fields original_ln_before, original_ln_after, residual_before_ln: expected a form in which the residual "
            f"stream, the branch and the adapter are each added once, got {before}, {after} and {own}",
        )
    return "residual" if fields["is_parallel"] else "sum" if before else "branch"


def _claim(
    branch: ResidualBranch,
    fields: Mapping[str, Any],
    reads: Reads,
    name: str,
    prefix: str,
    ledger: Ledger,
    base: BaseModel,
) -> BottleneckPlan:
    layer, width = branch.name.rpartition(".")[0], base.state_width
    stem = f"{prefix}{layer}.{PLACES[branch.role]}.adapters.{name}."
    position = 0
    if fields["ln_before"]:
        position = 1
        for norm in ("adapter_norm_before", "adapter_down.0"):  # one module under two names
            if f"{stem}{norm}.weight" in ledger or norm == "adapter_norm_before":
                ledger.claim(f"{stem}{norm}.weight", (width,))
                ledger.claim(f"{stem}{norm}.bias", (width,))
    size, _ = ledger.claim(f"{stem}adapter_down.{position}.weight", (None, width))
    _check_size(fields["reduction_factor"], branch.layer, width, size)
    ledger.claim(f"{stem}adapter_down.{position}.bias", (size,))
    ledger.claim(f"{stem}adapter_up.weight", (width, size))
    ledger.claim(f"{stem}adapter_up.bias", (width,))
    if fields["ln_after"]:
        ledger.claim(f"{stem}adapter_norm_after.weight", (width,))
        ledger.claim(f"{stem}adapter_norm_after.bias", (width,))
    if isinstance(fields["scaling"], str):
        ledger.claim(f"{stem}scaling", (1,) if fields["scaling"] == "learned" else (width,))
    return BottleneckPlan(stem, fields, reads)


def _check_size(factor: Any, layer: int, width: int, size: int) -> None:
    """Whether the factor, or the layer's among several, makes a bottleneck of the size that is there."""
    own = factor.get(str(layer), factor.get("default")) if isinstance(factor, dict) else factor
    if factor is not None and (own is None or size != max(1, int(width // own))):
        raise AdapterInvalid(
            Reason.INVALID_FIELD,
            f"field reduction_factor: expected {width} / {size} in layer {layer}, whose bottleneck has {size} units, "
            f"got {show(factor)}",
        )


def _norm(tensors: Mapping[str, Tensor], name: str) -> LayerNorm:
    return LayerNorm(tensors[f"{name}.weight"], tensors[f"{name}.bias"])
