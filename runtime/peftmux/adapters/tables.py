"""Input embeddings: which are tables of rows, and by what they scale what they look up."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import embedding


def table_scale(table: object) -> float | None:
    """1 for a plain embedding, its factor for one that scales its rows (Gemma 3), None for anything else."""
    if type(table) is nn.Embedding:
        return 1.0
    factor = getattr(table, "embed_scale", None)
    if not isinstance(table, nn.Embedding) or not isinstance(factor, torch.Tensor | float | int):
        return None
    scale = float(torch.as_tensor(factor).to(table.weight.dtype))
    ids = torch.arange(min(table.num_embeddings, 8), device=table.weight.device)
    with torch.no_grad():
        same = torch.equal(table(ids), embedding(ids, table.weight) * scale)
    return scale if same else None
