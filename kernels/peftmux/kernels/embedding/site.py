"""The adapters at the input embedding, and what they make of a batch's embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftmux.kernels.embedding.reference import EmbeddingPart, apply_embedding_part, scaled_part
from peftmux.kernels.lowrank import Segments
from peftmux.kernels.placed import placed


@dataclass(frozen=True, slots=True, eq=False)
class PreparedEmbedding:
    """A part on its device, in float32: owned by the site once put."""

    part: EmbeddingPart
    nbytes: int


class EmbeddingSite:
    """`prepare` may run in any thread; everything else belongs to the thread that runs the model."""

    graphed = False
    """Whether a captured CUDA graph serves whatever adapters come here later."""

    def __init__(self, device: torch.device, factor: float = 1.0) -> None:
        """factor: what the base multiplies its rows with when they are looked up."""
        self._device = device
        self._factor = factor
        self._held: dict[int, EmbeddingPart] = {}

    @property
    def empty(self) -> bool:
        return not self._held

    def prepare(self, part: EmbeddingPart) -> PreparedEmbedding:
        """ValueError for values that, with the factor in them, are not finite."""
        part = scaled_part(part, self._factor)
        pieces = (part.a, part.b, part.out_scale, part.rows)
        a, b, out_scale, rows = (None if t is None else self._place(t) for t in pieces)
        ids = None if part.ids is None else part.ids.to(self._device, torch.int64).contiguous()
        size = sum(t.nbytes for t in (a, b, out_scale, ids, rows) if t is not None)
        return PreparedEmbedding(EmbeddingPart(a, b, part.scale, out_scale, ids, rows), size)

    def _place(self, tensor: Tensor) -> Tensor:
        return placed(tensor, self._device, torch.float32, "an embedding's parameters")

    def put(self, slot: int, prepared: PreparedEmbedding) -> None:
        self._held[slot] = prepared.part

    def drop(self, slot: int) -> None:
        self._held.pop(slot, None)

    def apply(self, y: Tensor, ids: Tensor, segments: Segments) -> None:
        """Change, in place, the embeddings of tokens whose adapter has a part here. y: [T, D], ids: [T]."""
        for slot, start, end in segments.runs:
            part = self._held.get(slot)
            if part is not None:
                y[start:end] = apply_embedding_part(y[start:end], ids[start:end], part)
