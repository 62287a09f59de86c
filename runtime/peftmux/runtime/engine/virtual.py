"""Virtual tokens in front of rows: computed once, into the adapter's own cache blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftmux.runtime.params import OutputOptions, SamplingParams
from peftmux.runtime.scheduler import PrefixBlocks, RowPlan, Scheduler


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some virtual tokens of one or more prompts, as work for the runner."""

    rows: tuple[RowPlan, ...]
    embeddings: Tensor
    """[T, D], of the rows' tokens in order."""


def chunks(slot: int, prefixes: Sequence[PrefixBlocks], embeddings: Tensor, scheduler: Scheduler) -> Iterator[Chunk]:
    """All prompts, `max_batch_tokens` tokens at a time, each from its beginning on. embeddings: [prompts, n, D]."""
    size, length = scheduler.max_batch_tokens, embeddings.shape[1]
    for first in range(0, len(prefixes) * length, size):
        last = min(first + size, len(prefixes) * length)
        spans = [
            (prompt, max(first - prompt * length, 0), min(last - prompt * length, length))
            for prompt in range(first // length, (last - 1) // length + 1)
        ]
        spans.sort(key=lambda span: span[2] - span[1] > 1)  # as in every step: single tokens first
        rows = tuple(_row(slot, prefixes[p], start, stop, scheduler.block_size) for p, start, stop in spans)
        yield Chunk(rows, torch.cat([embeddings[p, start:stop] for p, start, stop in spans]))


def _row(slot: int, prefix: PrefixBlocks, start: int, stop: int, block_size: int) -> RowPlan:
    return RowPlan(
        row=0,
        slot=slot,
        tokens=tuple(range(-1 - start, -1 - stop, -1)),
        start=start,
        position_offset=0,
        blocks=prefix.blocks[: -(-stop // block_size)],
        samples=False,
        generated=0,
        sampling=SamplingParams(),
        output=OutputOptions(),
        prompt_logprobs_from=stop - start,
        next_tokens=(),
        suppressed=(),
        history=(),
        prompt_length=0,
    )
