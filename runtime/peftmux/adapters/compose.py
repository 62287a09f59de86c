"""A weighted sum of adapters as one adapter: what each adds to the base's layers, times its weight, added up.

    y' = y + sum_i w_i * delta_i(x)

Defined where an adapter only adds something that is linear in its parts: low rank, sparse changes, biases. Ranks are
put side by side, so nothing is merged and nothing is lost (PEFT calls this the combination type "cat").
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from peftmux.adapters.parts import (
    EmbeddingPart,
    ExpertsPart,
    LinearPart,
    LoweredAdapter,
    Part,
    Parts,
    RouterPart,
    SparsePart,
)

Summed = EmbeddingPart | ExpertsPart | RouterPart | SparsePart


def obstacle(lowered: LoweredAdapter) -> str:
    """Why the adapter cannot be a term of a sum; "" where it can."""
    parts = lowered.parts
    whole = {
        "a prefix": parts.prefix is not None,
        "virtual tokens": parts.virtual is not None or bool(parts.template),
        "a classification head": parts.head is not None,
        "an invocation, before which it does nothing": bool(lowered.invocation),
    }
    found = next((what for what, there in whole.items() if there), "")
    if found:
        return found
    return next((f"{what} at {place}" for place, part in parts.placed() if (what := _obstacle_of(part))), "")


def _obstacle_of(part: LinearPart | Part) -> str:
    if isinstance(part, LinearPart | EmbeddingPart) and part.out_scale is not None:
        return "an output scale"
    if isinstance(part, LinearPart) and part.gate is not None:
        return "a gate"
    if isinstance(part, EmbeddingPart) and part.rows is not None:
        return "replaced rows"
    return "" if isinstance(part, LinearPart | Summed) else f"a part of type {type(part).__name__}"


def sum_digest(terms: Sequence[tuple[str, float]]) -> str:
    """Hex sha256 of a sum: of its adapters' digests and their weights, in any order."""
    digest = hashlib.sha256(b"peftmux sum 1")
    for name, weight in sorted(terms):
        digest.update(bytes.fromhex(name) + struct.pack("<d", weight))
    return digest.hexdigest()


def weighted_sum(terms: Sequence[tuple[LoweredAdapter, float]], digest: str) -> LoweredAdapter:
    """One adapter that adds what all of them add. None of them may have an `obstacle`."""
    linear: dict[str, list[tuple[LinearPart, float]]] = {}
    others: dict[tuple[str, type], list[tuple[Summed, float]]] = {}
    for lowered, weight in terms:
        for place, part in lowered.parts.placed():
            assert not _obstacle_of(part), f"{type(part).__name__} at {place} cannot be summed"
            if isinstance(part, LinearPart):
                linear.setdefault(place, []).append((part, weight))
            elif isinstance(part, Summed):
                others.setdefault((place, type(part)), []).append((part, weight))
    by_place: dict[str, tuple[Part, ...]] = {}
    for (place, _), parts in others.items():
        by_place[place] = (*by_place.get(place, ()), _sum(parts))
    return LoweredAdapter(
        kind="weighted",
        digest=digest,
        parts=Parts({place: _sum_linear(parts) for place, parts in linear.items()}, by_place),
        tensors=sum(lowered.tensors for lowered, _ in terms),
        parameters=sum(lowered.parameters for lowered, _ in terms),
    )


def _sum_linear(parts: Sequence[tuple[LinearPart, float]]) -> LinearPart:
    biases = [weight * part.bias for part, weight in parts if part.bias is not None]
    bias = torch.stack(biases).sum(0) if biases else None
    ranked = [(part.a, part.b, part.scale * weight) for part, weight in parts if part.a is not None]
    if not ranked:
        return LinearPart(bias=bias)
    a, b, scale = _side_by_side(ranked, 0, 1)
    return LinearPart(a, b, scale, bias=bias)


def _sum(parts: Sequence[tuple[Summed, float]]) -> Summed:
    """All of one type."""
    first = parts[0][0]
    if isinstance(first, SparsePart):
        return _sum_sparse([(part, weight) for part, weight in parts if isinstance(part, SparsePart)])
    ranked = [(part.a, part.b, part.scale * weight) for part, weight in parts if not isinstance(part, SparsePart)]
    a, b, scale = _side_by_side(ranked, *((1, 2) if isinstance(first, ExpertsPart) else (0, 1)))
    return replace(first, a=a, b=b, scale=scale)


def _side_by_side(
    ranked: Sequence[tuple[Tensor | None, Tensor | None, float]], a_dim: int, b_dim: int
) -> tuple[Tensor, Tensor, float]:
    """One low-rank term for several; `a_dim` and `b_dim` are their rank dimensions. A single one stays as it is."""
    known = [(a, b, scale) for a, b, scale in ranked if a is not None and b is not None]
    if len(known) == 1:
        return known[0]
    return torch.cat([a for a, _, _ in known], a_dim), torch.cat([scale * b for _, b, scale in known], b_dim), 1.0


def _sum_sparse(parts: Sequence[tuple[SparsePart, float]]) -> SparsePart:
    """Entries that several change are one."""
    indices = torch.cat([part.indices for part, _ in parts], 1)
    values = torch.cat([weight * part.values for part, weight in parts])
    unique, where = indices.unique(dim=1, return_inverse=True)
    return SparsePart(unique, values.new_zeros(unique.shape[1]).index_add(0, where, values))
