"""Prefix tuning as AdapterHub's library saves it: the first real token stands at position 0.

Source: Li and Liang, 2021, arXiv 2101.00190. `<place>.prefix_tunings.<name>.self_prefix.control_trans` holds n *
layers * 2 * heads * head_dim values in the order of PEFT's, keys before values; every layer has a copy of the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import FieldTable, Honoured, NoEffect, is_positive_int
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.hub_fields import is_flag, read_exact
from peftmux.adapters.methods.ledger import Ledger
from peftmux.adapters.methods.prefix import provisioned_shape, split_prefix
from peftmux.adapters.methods.registry import Parts, Plan

FIELDS: FieldTable = {
    "architecture": Honoured(None, lambda v: v == "prefix_tuning", "prefix_tuning"),
    "prefix_length": Honoured(30, is_positive_int, "a positive integer"),
    "flat": Honoured(False, is_flag, "true or false"),
    "shared_gating": NoEffect("only read with use_gating, which is not served"),
    "bottleneck_size": NoEffect("of the perceptron, which a flat prefix has not"),
    "non_linearity": NoEffect("of the perceptron, which a flat prefix has not"),
    "encoder_prefix": NoEffect("a decoder's only attention is its own"),
    "cross_prefix": NoEffect("a decoder's only attention is its own"),
    "dropout": NoEffect("training only"),
    "init_weights_seed": NoEffect("initialisation"),
}


def plan_hub_prefix(name: str, config: Mapping[str, Any], ledger: Ledger, base: BaseModel) -> Plan:
    """Check the config and claim every copy of the prefix."""
    fields = read_exact(config, FIELDS)
    if not fields["flat"]:
        raise AdapterInvalid(
            Reason.UNSUPPORTED_FIELD,
            "field flat: expected true (`eject_prefix_tuning` makes a prefix flat before it is saved), got false",
        )
    shapes, n = tuple(base.kv_shapes), fields["prefix_length"]
    widest = provisioned_shape(shapes)
    size = n * len(shapes) * 2 * widest.kv_heads * widest.key_dim
    suffix = f"prefix_tunings.{name}.self_prefix.control_trans"
    copies = [tensor for tensor in ledger.unclaimed() if tensor.endswith(suffix)]
    for tensor in copies or [f"adapter/{name}/model.prefix_tuning.{suffix}"]:
        ledger.claim(tensor, (size,))

    def build(tensors: Mapping[str, Tensor]) -> Parts:
        stored = tensors[copies[0]]
        for tensor in copies[1:]:
            if not torch.equal(tensors[tensor], stored):
                raise AdapterInvalid(
                    Reason.UNUSED_TENSOR, f"tensor {tensor}: expected a copy of {copies[0]}, got other values"
                )
        prefix = split_prefix(stored.view(n, -1), shapes, widest)
        return Parts(prefix=dataclasses.replace(prefix, first_position=0))

    return Plan("prefix", build)
