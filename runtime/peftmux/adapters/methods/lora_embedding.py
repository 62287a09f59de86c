"""LoRA's tensors at the input embedding E [V, D], and the part that they make.

`<embedding>.lora_embedding_A` [r, V], `.lora_embedding_B` [D, r], with DoRA `.lora_magnitude_vector` [D], sometimes a
copy of E, `.base_layer.weight`. An output projection tied to E stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.methods.dora import chunked_out_scale
from peftmux.adapters.methods.ledger import PREFIX, Ledger
from peftmux.adapters.methods.lora_linear import check_copy, claim_copy, claim_low_rank
from peftmux.adapters.parts import EmbeddingPart


@dataclass(frozen=True, slots=True)
class EmbeddingPlan:
    """The tensors' names; None for what is not there."""

    scale: float
    a: str
    b: str
    magnitude: str | None
    copy: str | None


def plan_embedding(base: BaseModel, rank: int, scale: float, use_dora: bool, ledger: Ledger) -> EmbeddingPlan:
    """Claim the tensors of a targeted input embedding."""
    vocabulary, width = base.embedding_weight().shape
    stem = f"{PREFIX}{base.embedding}"
    a, b, magnitude = f"{stem}.lora_embedding_A", f"{stem}.lora_embedding_B", f"{stem}.lora_magnitude_vector"
    claim_low_rank(ledger, (a, vocabulary), (b, width), rank, base.embedding)
    if use_dora:
        ledger.claim(magnitude, (width,))
    return EmbeddingPlan(scale, a, b, magnitude if use_dora else None, claim_copy(ledger, stem, (vocabulary, width)))


def build_embedding(plan: EmbeddingPlan, tensors: Mapping[str, Tensor], base: BaseModel) -> EmbeddingPart:
    table = base.embedding_weight()
    if plan.copy:
        check_copy(base.embedding, tensors[plan.copy], table)
    a, b = tensors[plan.a], tensors[plan.b]
    out_scale = None
    if plan.magnitude:
        out_scale = chunked_out_scale(table.t(), a, b, plan.scale, tensors[plan.magnitude])
    return EmbeddingPart(a, b, plan.scale, out_scale)
