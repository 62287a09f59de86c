"""Few entries of a linear layer's weight, changed. The one definition.

    y'[t] = y[t] + D x[t],     D[row_i, column_i] = value_i, zero elsewhere

Source: SHiRA (Bhardwaj et al., 2024, arXiv 2406.13175), DiffPruning (Guo et al., 2021, arXiv 2012.07463).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class SparsePart:
    """indices: [2, n] int64, (row, column) of the weight [out, in], distinct. values: [n]. Values add to the base's."""

    indices: Tensor
    values: Tensor


def apply_sparse_part(y: Tensor, x: Tensor, part: SparsePart) -> Tensor:
    """The definition above, differentiable. y: [T, out], x: [T, in] -> [T, out] in y's dtype, in the values' dtype."""
    rows, columns = part.indices
    added = x.to(part.values.dtype)[:, columns] * part.values
    return y.to(added.dtype).index_add(1, rows, added).to(y.dtype)
