"""The input embedding's operator: what adapter methods that touch it lower to. The one definition.

    y'[t] = E'[id_t],   E' = out_scale * (E + scale * (B A)^T),   then the rows `ids` of E' are `rows`

Source: LoRA on an embedding (Hu et al., 2021, arXiv 2106.09685); with DoRA (Liu et al., 2024, arXiv 2402.09353) there
is one scale for each embedding dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class EmbeddingPart:
    """What one adapter does to the input embedding. Absent pieces are None; `a` and `b` go together.

    a: [r, V], b: [D, r], out_scale: [D], rows: [n, D], ids: [n] int64, distinct, or None where `rows` are all of E'.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    out_scale: Tensor | None = None
    ids: Tensor | None = None
    rows: Tensor | None = None

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]


def scaled_part(part: EmbeddingPart, factor: float) -> EmbeddingPart:
    """The same change of a table whose rows are multiplied by `factor` when they are looked up."""
    rows = None if part.rows is None else part.rows * factor
    return replace(part, scale=part.scale * factor, rows=rows)


def apply_embedding_part(y: Tensor, ids: Tensor, part: EmbeddingPart) -> Tensor:
    """The definition above, differentiable. y: [T, D] the base's embeddings of ids: [T] -> [T, D] in y's dtype.

    Everything is computed in the parts' dtype, rounded once at the end. ids must lie in the vocabulary.
    """
    out = y
    if part.a is not None and part.b is not None:
        out = out + part.scale * (part.a.t()[ids] @ part.b.t())
    if part.out_scale is not None:
        out = out * part.out_scale
    if part.rows is not None:
        out = part.rows[ids] if part.ids is None else _replaced(out, ids, part.ids, part.rows)
    return out.to(y.dtype)


def _replaced(y: Tensor, ids: Tensor, changed: Tensor, rows: Tensor) -> Tensor:
    """y with the row of `rows` [n, D] wherever the token's id is in `changed` [n]."""
    hit = ids.unsqueeze(1) == changed  # [T, n]
    return torch.where(hit.any(1, keepdim=True), rows[hit.int().argmax(1)].to(y.dtype), y)
