"""Adapters of the input embedding by Triton: one launch for all adapters of a step."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from peftmux.kernels.embedding import triton_kernels as kernels
from peftmux.kernels.embedding.reference import EmbeddingPart, scaled_part
from peftmux.kernels.embedding.site import EmbeddingSite, PreparedEmbedding
from peftmux.kernels.lowrank import Segments
from peftmux.kernels.slots import SlotTable

RANKS, IDS = 16, 256
"""Ranks, and changed ids, that one program reads at a time."""


@torch.library.custom_op("peftmux::adapt_embedding_", mutates_args={"y"})
def adapt_embedding_(y: Tensor, ids: Tensor, slots: Tensor, table: Tensor) -> None:
    """Change the embeddings of tokens whose slot has a record (see `record`).

    y: [tokens, D], ids: [tokens] int64, slots: [T] int32, T <= tokens, table: [S, 8] int64.
    """
    tokens, width = y.shape
    if ids.shape != (tokens,) or len(slots) > tokens or y.stride(1) != 1 or ids.stride(0) != 1:
        raise ValueError(
            f"expected ids and embeddings of at least {len(slots)} tokens, got {list(ids.shape)} and {list(y.shape)}"
        )
    if len(slots):
        block, warps = embedding_tile(width)
        kernels.embedding_kernel[(len(slots), triton.cdiv(width, block))](
            y,
            ids,
            slots,
            table,
            len(table),
            y.stride(0),
            WIDTH=width,
            BLOCK=block,
            RANKS=RANKS,
            IDS=IDS,
            num_warps=warps,
        )


def embedding_tile(width: int) -> tuple[int, int]:
    """(columns, warps) of one program."""
    return min(512, int(triton.next_power_of_2(width))), 4


def record(part: EmbeddingPart) -> tuple[Tensor | int, ...]:
    """Of a part as `TritonEmbeddingSite.prepare` lays it out: 1, the addresses of A^T [V, r], B^T [r, D] with the scale
    in it, out_scale, ids and rows (0: none), the rank, and the number of ids (-1: every row is replaced)."""
    pieces = (part.a, part.b, part.out_scale, part.ids, part.rows)
    count = 0 if part.rows is None else -1 if part.ids is None else len(part.ids)
    rank = 0 if part.b is None else len(part.b)
    return (1, *(0 if t is None else t for t in pieces), rank, count)


class TritonEmbeddingSite(EmbeddingSite):
    """As its base; holds A and B by rows that one token, or one rank, reads whole."""

    graphed = True

    def __init__(self, device: torch.device, factor: float = 1.0) -> None:
        super().__init__(device, factor)
        self._table = SlotTable(8, device)

    def prepare(self, part: EmbeddingPart) -> PreparedEmbedding:
        part = scaled_part(part, self._factor)
        a = None if part.a is None else self._place(part.a.t())
        b = None if part.b is None else self._place(part.b.t() * part.scale)
        out_scale, rows = (None if t is None else self._place(t) for t in (part.out_scale, part.rows))
        ids = None if part.ids is None else part.ids.to(self._device, torch.int64).contiguous()
        size = sum(t.nbytes for t in (a, b, out_scale, ids, rows) if t is not None)
        return PreparedEmbedding(EmbeddingPart(a, b, 1.0, out_scale, ids, rows), size)

    def put(self, slot: int, prepared: PreparedEmbedding) -> None:
        super().put(slot, prepared)
        self._table.put(slot, *record(prepared.part))

    def drop(self, slot: int) -> None:
        super().drop(slot)
        self._table.drop(slot)

    def apply(self, y: Tensor, ids: Tensor, segments: Segments) -> None:
        if segments.touches(self._held):
            adapt_embedding_(y, ids, segments.token_slots, self._table.tensor)
