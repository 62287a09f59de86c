"""Replaced rows of a linear layer's weight: a retrained output projection, or single tokens of it. The one definition.

y'[t, ids] = values x[t] + bias;   other columns are the base layer's own
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True, slots=True)
class ReplacedRows:
    """What one adapter puts in place of weight rows.

    values: [n, in], ids: [n] int64, distinct, or None for all rows, bias: [n].
    """

    values: Tensor
    ids: Tensor | None = None
    bias: Tensor | None = None


def apply_replaced_rows(y: Tensor, x: Tensor, part: ReplacedRows) -> Tensor:
    """The definition above. y: [T, out], x: [T, in] -> [T, out] in y's dtype, computed in the values' dtype."""
    new = linear(x.to(part.values.dtype), part.values, part.bias).to(y.dtype)
    return new if part.ids is None else y.index_copy(1, part.ids, new)
