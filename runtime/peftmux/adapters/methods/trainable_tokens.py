"""Trainable tokens alone: some rows of the input embedding, and of an output projection tied to it.

PEFT saves `<embedding>.trainable_tokens_delta` [n, D], which stands for the rows `token_indices` despite its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import COMMON, FieldTable, Honoured, NoEffect, is_text_or_texts, is_token_ids, read_fields
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.methods import replaced
from peftmux.adapters.methods.ledger import Ledger
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes

FIELDS: FieldTable = {
    **COMMON,
    "token_indices": Honoured(None, is_token_ids, "a list of token ids"),
    "target_modules": Honoured(None, is_text_or_texts, "the input embedding's name"),
    "init_weights": NoEffect("initialisation"),
}


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and every tensor's name and shape against the base."""
    fields, ledger = read_fields(config, FIELDS), Ledger(shapes)
    ids = fields["token_indices"]
    if not ids:
        raise AdapterInvalid(Reason.INVALID_FIELD, "field token_indices: expected a list of token ids, got nothing")
    names = fields["target_modules"] or [base.embedding]
    modules = [names] if isinstance(names, str) else names
    tokens = dict.fromkeys(modules, ids)
    new = replaced.plan_tokens(tokens, base, ledger, "trainable_tokens_delta")
    ledger.close()

    def build(tensors: Mapping[str, Tensor]) -> Parts:
        return Parts(others=replaced.build_replaced(new, tensors, base))

    return Plan("trainable-tokens", build)


METHOD = Method("TRAINABLE_TOKENS", plan, lambda base: ("trainable-tokens",) if base.embedding else ())
