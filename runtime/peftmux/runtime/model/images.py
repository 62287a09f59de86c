"""Rows with images in a step: the vectors that stand for their tokens, and attention both ways among these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from peftmux.kernels.attention import AttentionRows
from peftmux.kernels.vision import VisionSite
from peftmux.runtime.params import ImagePatches
from peftmux.runtime.scheduler.plan import ImageSpan, RowPlan


def attention_rows(rows: Sequence[RowPlan], device: torch.device) -> AttentionRows:
    """The rows as attention sees them.

    A token of an image sees every key up to the end of its span: a row of its own, whose context ends there. Keys are
    written before they are read, so the span's later ones are in the cache by then.
    """
    lens: list[int] = []
    contexts: list[int] = []
    tables: list[tuple[int, ...]] = []
    for row in rows:
        for count, context in _pieces(row) if row.images else ((len(row.tokens), row.start + len(row.tokens)),):
            lens.append(count)
            contexts.append(context)
            tables.append(row.blocks)
    return AttentionRows.build(lens, contexts, tables, device)


def _pieces(row: RowPlan) -> Iterator[tuple[int, int]]:
    """(queries, context) of neighbouring runs of the row's tokens."""
    at, end = row.start, row.start + len(row.tokens)
    for span in row.images:
        if not span.both_ways:
            continue
        first, stop = max(span.start, row.start), min(span.stop, end)
        assert stop == span.stop, "a span of images is computed in one step"
        if at < first:
            yield first - at, first
        yield from ((1, span.stop),) * (stop - first)
        at = stop
    if at < end:
        yield end - at, end


def image_vectors(rows: Sequence[RowPlan], vision: VisionSite) -> tuple[Tensor, Tensor]:
    """-> (which tokens of the flat batch are images' [n], what stands for their embeddings [n, D])."""
    tokens: list[Tensor] = []
    values: list[Tensor] = []
    first = 0
    for row in rows:
        for span in row.images:
            start, stop = max(span.start, row.start), min(span.stop, row.start + len(row.tokens))
            whole = _span_vectors(span, row.slot, vision)
            values.append(whole[start - span.start : stop - span.start])
            tokens.append(torch.arange(first + start - row.start, first + stop - row.start, device=whole.device))
        first += len(row.tokens)
    return torch.cat(tokens), torch.cat(values)


def _span_vectors(span: ImageSpan, slot: int, vision: VisionSite) -> Tensor:
    return torch.cat([vision.embed(slot, patches(image), image.rows, image.columns) for image in span.images])


def patches(image: ImagePatches) -> Tensor:
    """[rows * columns, 3 * p * p] float32."""
    return torch.frombuffer(bytearray(image.values), dtype=torch.float32).view(image.rows * image.columns, -1)
