"""Virtual tokens: those in front of rows are computed once, into the adapter's own cache blocks; others join a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftmux.adapters.parts import TokenGroup
from peftmux.adapters.template import PromptTooShort, inserts
from peftmux.runtime.errors import InvalidRequest
from peftmux.runtime.params import OutputOptions, SamplingParams
from peftmux.runtime.scheduler import PrefixBlocks, RowPlan, Scheduler


def fill_template(prompt: tuple[int, ...], template: Sequence[TokenGroup]) -> tuple[int, ...]:
    """The prompt with the template's virtual tokens, as ids -1, -2, ... in the order of its groups.

    InvalidRequest for a prompt that is too short for a group's position.
    """
    if not template:
        return prompt
    filled: list[int] = []
    done = 0
    try:
        for index, tokens in inserts(template, len(prompt)):
            filled += [*prompt[done:index], *(-1 - token for token in tokens)]
            done = index
    except PromptTooShort as error:
        raise InvalidRequest(
            "input", f"expected at least {error.least} tokens for the adapter's template, got {len(prompt)}"
        ) from None
    return (*filled, *prompt[done:])


def without_trailing(tokens: tuple[int, ...]) -> tuple[int, ...]:
    """Up to the last real token: what stands after it cannot change its hidden state."""
    end = len(tokens)
    while tokens[end - 1] < 0:
        end -= 1
    return tokens[:end]


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
        tokens=(0,) * (stop - start),
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
        history=None,
    )
