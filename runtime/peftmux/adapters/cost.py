"""What each token of an adapter's rows costs, beside the base model's own."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from peftmux.adapters.parts import (
    EmbeddingPart,
    KVPrefix,
    Ladder,
    LoweredAdapter,
    SparsePart,
    VirtualRows,
    VirtualTokens,
)
from peftmux.kernels.tree import tensors


@dataclass(frozen=True, slots=True)
class Cost:
    """parts: how many of each kind the adapter lowers to.

    flops: per token; of mixtures with every expert counted, so at most. virtual_tokens: how many a row has, whose keys
    every token reads as well, at what one more token of context costs on this base.
    cache: bytes of keys and values for each token of a row.
    """

    parts: dict[str, int]
    flops: int
    virtual_tokens: int
    cache: int


def cost(adapter: LoweredAdapter, dtype: torch.dtype) -> Cost:
    parts = adapter.parts
    found: list[Any] = [part for _, part in parts.placed()]
    found += [part for part in (parts.prefix, parts.virtual, parts.head) if part is not None]
    counts = Counter(type(part).__name__ for part in found)
    before = parts.prefix or parts.virtual
    return Cost(
        dict(counts),
        sum(map(_flops, found)),
        (before.length if before else 0) + sum(group.tokens for group in parts.template),
        sum(part.cached_values for part in found if isinstance(part, Ladder)) * dtype.itemsize,
    )


def _flops(part: Any) -> int:
    """Two for every entry of a matrix that a token meets, one for every entry of a vector."""
    if isinstance(part, KVPrefix | VirtualTokens | VirtualRows):
        return 0
    if isinstance(part, EmbeddingPart):  # one column of A, one row of the replaced ones
        return 0 if part.b is None else 2 * part.b.numel()
    if isinstance(part, SparsePart):
        return 2 * part.values.numel()
    floats = [t for t in tensors(part) if t.is_floating_point()]
    return sum(t.numel() * (2 if t.dim() > 1 else 1) for t in floats)
