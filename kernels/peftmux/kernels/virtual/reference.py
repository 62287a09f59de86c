"""Virtual tokens: ids below zero are rows of the adapter's table instead of the vocabulary's. The one definition.

    e[t] = values[-1 - id_t]

Source: P-Tuning (Liu et al., 2021, arXiv 2103.10385), whose templates put trained vectors among a prompt's embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class VirtualRows:
    """values: [m, D], each as the embedding layer's output would be (never scaled)."""

    values: Tensor


def virtual_embeddings(ids: Tensor, part: VirtualRows) -> Tensor:
    """The definition above, differentiable. ids: [n] int64, -m .. -1 -> [n, D]."""
    return part.values[-1 - ids]
