"""What an adapter costs: bytes where it is placed, and floating-point operations for each of its tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from peftmux.adapters.parts import EmbeddingPart, Ladder, LoweredAdapter
from peftmux.kernels.tree import tensors

_INDEX_BYTES = 8


@dataclass(frozen=True, slots=True)
class Cost:
    """parts: how many of each kind the adapter lowers to. size: bytes in the base's dtype, cache blocks rounded down.

    flops: per token, beside the base's own; of mixtures with every expert counted, so at most; without attention.
    cache: bytes of keys and values for each token of a row, beside the base's.
    """

    parts: dict[str, int]
    size: int
    flops: int
    cache: int


def cost(adapter: LoweredAdapter, dtype: torch.dtype) -> Cost:
    parts = adapter.parts
    found: list[Any] = [part for _, part in parts.placed()]
    found += [part for part in (parts.prefix, parts.virtual, parts.head) if part is not None]
    counts = Counter(type(part).__name__ for part in found)
    return Cost(
        dict(counts),
        sum(_size(part, dtype) for part in found),
        sum(map(_flops, found)),
        sum(part.cached_values for part in found if isinstance(part, Ladder)) * dtype.itemsize,
    )


def _size(part: Any, dtype: torch.dtype) -> int:
    width = dtype.itemsize
    return sum(t.numel() * (width if t.is_floating_point() else _INDEX_BYTES) for t in tensors(part))


def _flops(part: Any) -> int:
    """Two for every entry of a matrix that a token meets, one for every entry of a vector."""
    if isinstance(part, EmbeddingPart):  # one column of A, one row of the replaced ones
        return 0 if part.b is None else 2 * part.b.numel()
    floats = [t for t in tensors(part) if t.is_floating_point()]
    return sum(t.numel() * (2 if t.dim() > 1 else 1) for t in floats)
