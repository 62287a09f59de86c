"""Prompt tuning: virtual tokens in front of the prompt, whatever they were initialised from.

Source: Lester et al., 2021, arXiv 2104.08691. PEFT stores `prompt_embeddings` [n, D] and puts them before the output of
the embedding layer, so a base that scales what it looks up does not scale them. The first real token has position n.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import COMMON, FieldTable, Honoured, NoEffect, is_positive_int, read_fields
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.methods.ledger import Ledger
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes
from peftmux.adapters.parts import VirtualTokens

TENSOR = "prompt_embeddings"
COUNT = "a positive integer"

PROMPT_FIELDS: FieldTable = {
    **COMMON,
    "num_virtual_tokens": Honoured(None, is_positive_int, COUNT),
    "token_dim": Honoured(None, is_positive_int, COUNT),
    "num_transformer_submodules": Honoured(1, lambda v: v == 1, "1 (a decoder)", Reason.UNSUPPORTED_FIELD),
    "num_layers": NoEffect("of the base, whose layers hold nothing of the prompt"),
    "num_attention_heads": NoEffect("of the base, whose layers hold nothing of the prompt"),
}
"""Of every method whose virtual tokens are embeddings."""
FIELDS: FieldTable = {
    **PROMPT_FIELDS,
    "prompt_tuning_init": NoEffect("initialisation"),
    "prompt_tuning_init_text": NoEffect("initialisation"),
    "tokenizer_name_or_path": NoEffect("initialisation"),
    "tokenizer_kwargs": NoEffect("initialisation"),
}


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and the one tensor against the base's embeddings."""
    return plan_prompt("prompt", read_fields(config, FIELDS), shapes, base)


def plan_prompt(kind: str, fields: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Of a method with virtual tokens in front and nothing else."""
    ledger = Ledger(shapes)
    claim_prompt(fields, ledger, base)
    ledger.close()
    return Plan(kind, _build)


def claim_prompt(fields: Mapping[str, Any], ledger: Ledger, base: BaseModel) -> tuple[int, int]:
    """The prompt's shape [n, D]. Raises AdapterInvalid where config, tensor and base disagree."""
    length, width = fields["num_virtual_tokens"], base.embedding_width
    if length is None:
        raise AdapterInvalid(Reason.INVALID_FIELD, f"field num_virtual_tokens: expected {COUNT}, got nothing")
    if fields["token_dim"] not in (None, width):
        raise AdapterInvalid(
            Reason.SHAPE_MISMATCH, f"field token_dim: expected {width} for this base, got {fields['token_dim']}"
        )
    ledger.claim(TENSOR, (length, width))
    return length, width


def _build(tensors: Mapping[str, Tensor]) -> Parts:
    return Parts(virtual=VirtualTokens(tensors[TENSOR].unsqueeze(0)))


METHOD = Method("PROMPT_TUNING", plan, lambda base: ("prompt",))
