"""Prefix tuning: keys and values in front of every attention layer, used as stored and never rotated.

Source: Li and Liang, 2021, arXiv 2101.00190. PEFT stores `prompt_embeddings` [n, layers * 2 * heads * head_dim], layer
by layer, the keys before the values, after its encoder if it had one. The first real token stands at position n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from peftmux.adapters.base import BaseModel, KVShape
from peftmux.adapters.config import COMMON, FieldTable, Honoured, NoEffect, is_positive_int, read_fields
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.methods.ledger import Ledger
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes
from peftmux.adapters.parts import KVPrefix

TENSOR = "prompt_embeddings"
_COUNT = "a positive integer"

FIELDS: FieldTable = {
    **COMMON,
    "num_virtual_tokens": Honoured(None, is_positive_int, _COUNT),
    "num_layers": Honoured(None, is_positive_int, _COUNT),
    "num_attention_heads": Honoured(None, is_positive_int, _COUNT),
    "token_dim": Honoured(None, is_positive_int, _COUNT),
    "num_transformer_submodules": Honoured(1, lambda v: v == 1, "1 (a decoder)", Reason.UNSUPPORTED_FIELD),
    "encoder_hidden_size": NoEffect("of the encoder, whose output is what is saved"),
    "prefix_projection": NoEffect("whether there was an encoder, whose output is what is saved"),
    "init_weights": NoEffect("initialisation"),
}


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and the one tensor against the base's cache shapes."""
    fields = read_fields(config, FIELDS)
    layers = len(base.kv_shapes)
    widest = provisioned_shape(base.kv_shapes)
    length = fields["num_virtual_tokens"]
    if length is None:
        raise AdapterInvalid(Reason.INVALID_FIELD, "field num_virtual_tokens: expected a positive integer, got nothing")
    expected = {
        "num_layers": layers,
        "num_attention_heads": widest.kv_heads,
        "token_dim": widest.kv_heads * widest.key_dim,
    }
    for name, value in expected.items():
        if fields[name] not in (None, value):
            raise AdapterInvalid(
                Reason.SHAPE_MISMATCH, f"field {name}: expected {value} for this base, got {fields[name]}"
            )
    ledger = Ledger(shapes)
    ledger.claim(TENSOR, (length, layers * 2 * widest.kv_heads * widest.key_dim))
    ledger.close()
    return Plan("prefix", partial(_build, shapes=tuple(base.kv_shapes), widest=widest))


def kinds(base: BaseModel) -> tuple[str, ...]:
    try:
        provisioned_shape(base.kv_shapes)
    except AdapterInvalid:
        return ()
    return ("prefix",)


def provisioned_shape(shapes: Sequence[KVShape]) -> KVShape:
    """The shape that every layer is stored with: the layers' own, or where they differ that of the widest keys.

    A layer with smaller ones takes the first heads and features, as in PEFT. Raises AdapterInvalid where some layer
    would not fit, or where keys and values differ in width: PEFT's layout cannot hold those.
    """
    if not shapes:
        raise AdapterInvalid(Reason.NO_SITES, "expected a base with attention layers, got none")
    widest = max(shapes, key=lambda s: s.key_dim)
    for layer, shape in enumerate(shapes):
        if shape.key_dim != shape.value_dim or shape.kv_heads > widest.kv_heads:
            raise AdapterInvalid(
                Reason.UNSUPPORTED_SITE,
                f"prefix tuning cannot store layer {layer} of this base: expected keys and values of one width and at "
                f"most {widest.kv_heads} heads, got {shape.kv_heads} heads of {shape.key_dim} and {shape.value_dim}",
            )
    return widest


def split_prefix(stored: Tensor, shapes: Sequence[KVShape], widest: KVShape) -> KVPrefix:
    """The parts of a stored prefix [n, layers * 2 * heads * head_dim], as views. Differentiable."""
    n = stored.shape[0]
    by_layer = stored.view(n, len(shapes), 2, widest.kv_heads, widest.key_dim).unbind(1)
    cut = [
        (both[:, 0, : s.kv_heads, : s.key_dim], both[:, 1, : s.kv_heads, : s.value_dim])
        for both, s in zip(by_layer, shapes, strict=True)
    ]
    return KVPrefix(tuple(k for k, _ in cut), tuple(v for _, v in cut), first_position=n)


def _build(tensors: Mapping[str, Tensor], shapes: Sequence[KVShape], widest: KVShape) -> Parts:
    return Parts(prefix=split_prefix(tensors[TENSOR], shapes, widest))


METHOD = Method("PREFIX_TUNING", plan, kinds)
