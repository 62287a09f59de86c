"""Virtual tokens among a row's own in a step: the vectors that stand for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftmux.kernels.virtual import VirtualSite
from peftmux.runtime.model.staging import to_device
from peftmux.runtime.scheduler.plan import RowPlan

Vectors = tuple[Tensor, Tensor]
"""As StepInputs.vectors."""


def virtual_vectors(rows: Sequence[RowPlan], site: VirtualSite) -> Vectors | None:
    """-> (which tokens of the flat batch are virtual [n], what stands for their embeddings [n, D]), None for none."""
    tokens: list[int] = []
    slots: list[int] = []
    ids: list[list[int]] = []
    first = 0
    for row in rows:
        if row.slot in site and min(row.tokens) < 0:
            own = [i for i, token in enumerate(row.tokens) if token < 0]
            tokens += [first + i for i in own]
            slots.append(row.slot)
            ids.append([row.tokens[i] for i in own])
        first += len(row.tokens)
    if not tokens:
        return None
    places, *looked_up = to_device([tokens, *ids], site.device)
    return places, torch.cat([site.lookup(slot, own) for slot, own in zip(slots, looked_up, strict=True)])


def joined(one: Vectors | None, other: Vectors) -> Vectors:
    """Of one step: no token is in both."""
    if one is None:
        return other
    dtype = torch.promote_types(one[1].dtype, other[1].dtype)
    return torch.cat([one[0], other[0]]), torch.cat([one[1].to(dtype), other[1].to(dtype)])
