"""From the memory of tiny steps to that of large ones.

The tensors of a step have sizes that are products of the batch's rows B, its tokens a row T and the positions K whose
logits are computed: every operation's live bytes are a polynomial in them, found exactly from a few small batches. The
peak of a large step is the largest of these polynomials at its size, at whichever operation that is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Shape(NamedTuple):
    """A batch of `rows` sequences of `tokens` tokens, with logits at the last `kept` positions."""

    rows: int
    tokens: int
    kept: int


SMALL = (
    *(Shape(2, 8, 3), Shape(2, 12, 3), Shape(2, 20, 3), Shape(4, 8, 3), Shape(4, 12, 3), Shape(4, 20, 3)),
    *(Shape(2, 20, 9), Shape(4, 12, 7), Shape(4, 20, 12)),
)
"""Enough to tell the terms apart, and two more to see that there are no others."""
SINGLE = tuple(Shape(1, tokens, kept) for tokens, kept in ((8, 3), (12, 3), (20, 3), (16, 3), (20, 9), (12, 7)))
"""For runs of one row a batch: what has to be copied for several rows is then in place already."""
_RESIDUAL = 0.02


class StepMemory:
    """lines: for each of the small batches, the live bytes after every operation of a step."""

    def __init__(self, shapes: Sequence[Shape], lines: Sequence[Sequence[int]]) -> None:
        same = len({len(line) for line in lines}) == 1
        values = np.array(lines if same else [[max(line)] for line in lines], dtype=np.float64)
        terms = np.stack([_terms(shape) for shape in shapes])
        self._factors: NDArray[Any] = np.linalg.lstsq(terms, values, rcond=None)[0]
        apart = np.abs(terms @ self._factors - values).max() / values.max()
        self.exact = bool(same and apart < _RESIDUAL)
        """Whether the polynomials explain the small batches; where a step's operations depend on the tokens (experts)
        they are a fit."""

    def peak(self, shape: Shape) -> int:
        """Bytes."""
        return round(float((_terms(shape) @ self._factors).max()))

    def largest(self, shapes: Iterable[Shape]) -> Shape:
        """The batch with the highest peak."""
        return max(set(shapes), key=self.peak)


def _terms(shape: Shape) -> NDArray[np.float64]:
    b, t, k = shape
    return np.array([1, b, t, t * t, b * t, b * t * t, b * k], dtype=np.float64)
