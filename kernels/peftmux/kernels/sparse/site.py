"""The adapters with sparse changes at one linear layer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from peftmux.kernels.lowrank import Segments
from peftmux.kernels.sparse.reference import SparsePart


@dataclass(frozen=True, slots=True, eq=False)
class PreparedSparse:
    """The change as a compressed-row matrix [out, in] in float32 on its device: owned by the site once put."""

    matrix: Tensor
    nbytes: int


class SparseSite:
    """`prepare` may run in any thread; everything else belongs to the thread that runs the model."""

    graphed = False
    """Whether a captured CUDA graph serves whatever adapters come here later."""

    def __init__(self, in_features: int, out_features: int, device: torch.device) -> None:
        self._shape = (out_features, in_features)
        self._device = device
        self._held: dict[int, Tensor] = {}

    @property
    def empty(self) -> bool:
        return not self._held

    def prepare(self, part: SparsePart) -> PreparedSparse:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: compressed rows are in beta
            values = part.values.to(self._device, torch.float32)
            matrix = torch.sparse_coo_tensor(part.indices.to(self._device), values, self._shape).to_sparse_csr()
        pieces = (matrix.crow_indices(), matrix.col_indices(), matrix.values())
        return PreparedSparse(matrix, sum(t.nbytes for t in pieces))

    def put(self, slot: int, prepared: PreparedSparse) -> None:
        self._held[slot] = prepared.matrix

    def drop(self, slot: int) -> None:
        self._held.pop(slot, None)

    def apply(self, y: Tensor, x: Tensor, segments: Segments) -> None:
        """Add, in place, to the outputs of tokens whose adapter has a change here. y: [T, out], x: [T, in]."""
        for slot, start, end in segments.runs:
            matrix = self._held.get(slot)
            if matrix is not None:
                added = (matrix @ x[start:end].t().float()).t()
                y[start:end] = (y[start:end] + added).to(y.dtype)
