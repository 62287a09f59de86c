"""Ladder side-tuning: a narrow transformer beside the base, which reads its layers and changes what its head reads.

Source: Sung et al., 2022, arXiv 2206.06522; the formulas stand in `peftmux.kernels.ladder`. No library writes such
files for decoders: they are PEFT's two files with peft_type LADDER and, for a side network of width d over a base of
width D (final hidden states of width F), the tensors

    ladder.first.weight [d, D]
    ladder.rungs.N.down.weight [d, D], ladder.rungs.N.gate [1]      for every layer N of the base with a side block
    ladder.rungs.N.block.input_layernorm.weight [d]
    ladder.rungs.N.block.self_attn.{q_proj [H E, d], k_proj, v_proj [K E, d], o_proj [d, H E]}.weight
    ladder.rungs.N.block.post_attention_layernorm.weight [d]
    ladder.rungs.N.block.mlp.{gate_proj [m, d], up_proj [m, d], down_proj [d, m]}.weight
    ladder.norm.weight [d], ladder.up.weight [F, d], and ladder.merge_gate [1] with merge "gate"

Beside the `.weight` of every linear layer stands a `.bias`, or beside none. Fields: `num_attention_heads` H,
`num_key_value_heads` K (H if absent), `layers` (all of the base's if absent), `hidden_act`, `rms_norm_eps`,
`rope_theta`, `temperature` of the gates, and `merge`: what the head reads is the ladder's state ("replace", as in the
paper), the final state and the ladder's ("add"), or a gated mean of both ("gate"). Tokens of the side network have the
base's position ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import (
    COMMON,
    FieldTable,
    Honoured,
    NoEffect,
    is_layers,
    is_number,
    is_positive_int,
    read_fields,
)
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.methods.ledger import Ledger
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes
from peftmux.adapters.parts import LADDER, Ladder
from peftmux.kernels.ladder import ACTIVATIONS, Affine, Rung, SideBlock

STEM = "ladder."
_COUNT = "a positive integer"


def _number(default: float, low: float) -> Honoured:
    """Below `low` float32 has no reciprocal worth having, or the formula no meaning."""
    return Honoured(default, lambda v: is_number(v) and v >= low, f"a number from {low:g} on")


FIELDS: FieldTable = {
    **COMMON,
    "num_attention_heads": Honoured(None, is_positive_int, _COUNT),
    "num_key_value_heads": Honoured(None, is_positive_int, _COUNT),
    "layers": Honoured(None, lambda v: isinstance(v, list) and is_layers(v), "a list of layer numbers"),
    "hidden_act": Honoured(
        "silu", lambda v: isinstance(v, str) and v in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}"
    ),
    "rms_norm_eps": _number(1e-5, 1e-12),
    "rope_theta": _number(10_000.0, 1.0),
    "temperature": _number(0.1, 1e-4),
    "merge": Honoured("replace", lambda v: v in ("add", "replace", "gate"), "add, replace or gate"),
    "reduction_factor": NoEffect("the sizes are in the tensors"),
    "dropout": NoEffect("training only"),
}


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and every tensor's name and shape against the base."""
    fields = read_fields(config, FIELDS)
    layers = _layers(fields["layers"], base)
    heads, kv_heads = _heads(fields)
    ledger = Ledger(shapes)
    width = _claim_linear(ledger, "first", None, base.hidden_size)
    _claim_linear(ledger, "up", base.state_width, width)
    ledger.claim(f"{STEM}norm.weight", (width,))
    if fields["merge"] == "gate":
        ledger.claim(f"{STEM}merge_gate", (1,))
    queries: int | None = None
    for layer in layers:
        _claim_linear(ledger, f"rungs.{layer}.down", width, base.hidden_size)
        ledger.claim(f"{STEM}rungs.{layer}.gate", (1,))
        queries = _claim_block(ledger, f"rungs.{layer}.block.", width, queries, heads, kv_heads)
    ledger.close()

    def build(tensors: Mapping[str, Tensor]) -> Parts:
        ladder = assemble(tensors, {**fields, "layers": layers, "num_key_value_heads": kv_heads})
        return Parts(others={LADDER: (ladder,)})

    return Plan("ladder", build)


def _claim_linear(ledger: Ledger, name: str, out: int | None, inside: int) -> int:
    """With its bias, if this ladder has them. Returns how many values it gives."""
    size, _ = ledger.claim(f"{STEM}{name}.weight", (out, inside))
    if ledger.has(f"{STEM}first.bias"):
        ledger.claim(f"{STEM}{name}.bias", (size,))
    return size


def _claim_block(ledger: Ledger, block: str, width: int, queries: int | None, heads: int, kv_heads: int) -> int:
    """queries: how many values the first block's queries have, which is every block's. Returns it."""
    for norm in ("input_layernorm", "post_attention_layernorm"):
        ledger.claim(f"{STEM}{block}{norm}.weight", (width,))
    queries = _claim_linear(ledger, f"{block}self_attn.q_proj", queries, width)
    keys = _head_dim(queries, heads) * kv_heads
    _claim_linear(ledger, f"{block}self_attn.k_proj", keys, width)
    _claim_linear(ledger, f"{block}self_attn.v_proj", keys, width)
    _claim_linear(ledger, f"{block}self_attn.o_proj", width, queries)
    inner = _claim_linear(ledger, f"{block}mlp.gate_proj", None, width)
    _claim_linear(ledger, f"{block}mlp.up_proj", inner, width)
    _claim_linear(ledger, f"{block}mlp.down_proj", width, inner)
    return queries


def assemble(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> Ladder:
    """A ladder of tensors by their names in the file. `fields`: all that are honoured here, none left out."""
    return Ladder(
        first=_affine(tensors, "first"),
        rungs=tuple(_rung(layer, tensors) for layer in fields["layers"]),
        norm=tensors[f"{STEM}norm.weight"],
        up=_affine(tensors, "up"),
        heads=fields["num_attention_heads"],
        kv_heads=fields["num_key_value_heads"],
        activation=fields["hidden_act"],
        temperature=float(fields["temperature"]),
        rope_theta=float(fields["rope_theta"]),
        eps=float(fields["rms_norm_eps"]),
        merge=fields["merge"],
        merge_gate=tensors.get(f"{STEM}merge_gate"),
    )


def kinds(base: BaseModel) -> tuple[str, ...]:
    return ("ladder",) if base.stream_layers else ()


def _layers(wanted: list[int] | None, base: BaseModel) -> list[int]:
    count = len(base.stream_layers)
    if not count:
        raise AdapterInvalid(
            Reason.UNSUPPORTED_SITE,
            f"ladders are not served on {base.architecture}: expected decoder layers that each read what the one "
            "before it gives, and final hidden states that can be read",
        )
    layers = list(range(count)) if not wanted else sorted(set(wanted))
    if layers[-1] >= count or (wanted and len(layers) < len(wanted)):
        raise AdapterInvalid(
            Reason.INVALID_FIELD, f"field layers: expected distinct layers below {count}, got {str(wanted)[:80]}"
        )
    return layers


def _heads(fields: Mapping[str, Any]) -> tuple[int, int]:
    heads = fields["num_attention_heads"]
    if heads is None:
        raise AdapterInvalid(Reason.INVALID_FIELD, f"field num_attention_heads: expected {_COUNT}, got nothing")
    kv_heads = fields["num_key_value_heads"] or heads
    if heads % kv_heads:
        raise AdapterInvalid(
            Reason.INVALID_FIELD, f"field num_key_value_heads: expected a divisor of {heads}, got {kv_heads}"
        )
    return heads, kv_heads


def _head_dim(queries: int, heads: int) -> int:
    """Rotary positions turn halves of a head."""
    if queries % (2 * heads):
        raise AdapterInvalid(
            Reason.SHAPE_MISMATCH,
            f"expected q_proj to give each of the {heads} heads of num_attention_heads an even number of values, "
            f"got {queries} rows",
        )
    return queries // heads


def _rung(layer: int, tensors: Mapping[str, Tensor]) -> Rung:
    rung, block = f"rungs.{layer}.", f"rungs.{layer}.block."
    q, k, v, o = (_affine(tensors, f"{block}self_attn.{name}_proj") for name in "qkvo")
    gate, up, down = (_affine(tensors, f"{block}mlp.{name}_proj") for name in ("gate", "up", "down"))
    before, between = (
        tensors[f"{STEM}{block}{name}.weight"] for name in ("input_layernorm", "post_attention_layernorm")
    )
    own = SideBlock(before, q, k, v, o, between, gate, up, down)
    return Rung(layer, _affine(tensors, f"{rung}down"), tensors[f"{STEM}{rung}gate"], own)


def _affine(tensors: Mapping[str, Tensor], name: str) -> Affine:
    return Affine(tensors[f"{STEM}{name}.weight"], tensors.get(f"{STEM}{name}.bias"))


METHOD = Method("LADDER", plan, kinds)
