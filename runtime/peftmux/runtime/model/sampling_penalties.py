"""What a request changes in its logits before the draw, in this order:

repetition  Keskar et al. 2019 as Hugging Face has it: for ids of prompt and output, l / p if l > 0 else l * p
presence    OpenAI: l - a for ids of the output
frequency   OpenAI: l - a * count in the output
bias        l + b for the ids named
suppressed  -inf
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peftmux.runtime.model.staging import on_device
from peftmux.runtime.scheduler.plan import RowPlan

Change = tuple[int, Any, Any]
"""(row, its ids, each once, a value for each or one for all): sequences of numbers."""


def changes_logits(row: RowPlan) -> bool:
    return bool(row.history is not None or row.sampling.logit_bias or row.suppressed)


def change_logits(logits: Tensor, rows: Sequence[RowPlan]) -> None:
    """In place. logits: [R, V] float32, contiguous; rows: R."""
    flat, width = logits.view(-1), logits.shape[1]
    if repeated := _entries(_repeated(rows), width, logits.device):
        at, penalty = repeated
        found = flat[at]
        flat[at] = torch.where(found > 0, found / penalty, found * penalty)
    for added in (_output_penalties(rows), _biases(rows)):
        if entries := _entries(added, width, logits.device):
            at, amount = entries
            flat[at] += amount
    if suppressed := _entries(_suppressed(rows), width, logits.device):
        at, amount = suppressed
        flat[at] = amount


def _entries(changes: Iterator[Change], width: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Where in the flattened logits, and the float32 values there; None for nothing. width: V."""
    found = [(row * width + np.asarray(ids, dtype=np.int64), values) for row, ids, values in changes if len(ids)]
    if not found:
        return None
    spread: list[NDArray[Any]] = [np.broadcast_to(np.asarray(values), at.shape) for at, values in found]
    at = on_device(np.concatenate([at for at, _ in found]), device)
    return at, on_device(np.concatenate(spread), device, torch.float32)


def _repeated(rows: Sequence[RowPlan]) -> Iterator[Change]:
    for i, row in enumerate(rows):
        if row.history is not None and row.sampling.repetition_penalty != 1.0:
            yield i, row.history.seen, row.sampling.repetition_penalty


def _output_penalties(rows: Sequence[RowPlan]) -> Iterator[Change]:
    for i, row in enumerate(rows):
        presence, frequency = row.sampling.presence_penalty, row.sampling.frequency_penalty
        if row.history is not None and (presence or frequency):
            yield i, row.history.drawn, -(presence + frequency * np.array(row.history.counts, dtype=np.float64))


def _biases(rows: Sequence[RowPlan]) -> Iterator[Change]:
    for i, row in enumerate(rows):
        if biases := row.sampling.logit_bias:
            yield i, list(biases), list(biases.values())


def _suppressed(rows: Sequence[RowPlan]) -> Iterator[Change]:
    for i, row in enumerate(rows):
        yield i, row.suppressed, float("-inf")
