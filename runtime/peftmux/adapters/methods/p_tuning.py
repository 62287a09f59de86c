"""P-Tuning: virtual tokens that an encoder (an MLP or an LSTM) made while training. The encoder is not saved.

Source: Liu et al., 2021, arXiv 2103.10385. PEFT puts them in front and stores what the encoder made of them, as
`prompt_embeddings` [n, D]: served as `prompt` is. For other positions of the paper's templates see `p_tuning_template`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import FieldTable, NoEffect, read_fields
from peftmux.adapters.methods.prompt import PROMPT_FIELDS, plan_prompt
from peftmux.adapters.methods.registry import Method, Plan, Shapes

ENCODER_FIELDS: FieldTable = {
    name: NoEffect("of the encoder, whose output is what is saved")
    for name in (
        "encoder_reparameterization_type",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_dropout",
    )
}
FIELDS: FieldTable = {**PROMPT_FIELDS, **ENCODER_FIELDS}


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and the one tensor against the base's embeddings."""
    return plan_prompt("p-tuning", read_fields(config, FIELDS), shapes, base)


METHOD = Method("P_TUNING", plan, lambda base: ("p-tuning",))
