"""What a request changes in its logits before the draw, in this order:

repetition  Keskar et al. 2019 as Hugging Face has it: for ids of prompt and output, l / p if l > 0 else l * p
presence    OpenAI: l - a for ids of the output
frequency   OpenAI: l - a * count in the output
bias        l + b for the ids named
suppressed  -inf
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from peftmux.runtime.model.staging import on_device
from peftmux.runtime.scheduler.plan import RowPlan


def changes_logits(row: RowPlan) -> bool:
    return bool(row.history or row.sampling.logit_bias or row.suppressed)


def change_logits(logits: Tensor, rows: Sequence[RowPlan]) -> None:
    """In place. logits: [R, V] float32; rows: R."""
    repeated = _entries(
        logits, ((i, t, row.sampling.repetition_penalty) for i, row in enumerate(rows) for t in _seen(row))
    )
    if repeated is not None:
        at, penalty = repeated
        found = logits[at]
        logits[at] = torch.where(found > 0, found / penalty, found * penalty)
    added = _entries(logits, ((i, t, -a) for i, row in enumerate(rows) for t, a in _output_penalties(row)))
    for entries in (added, _entries(logits, _biases(rows))):
        if entries is not None:
            at, amount = entries
            logits[at] += amount
    suppressed = _entries(logits, ((i, t, float("-inf")) for i, row in enumerate(rows) for t in row.suppressed))
    if suppressed is not None:
        at, amount = suppressed
        logits[at] = amount


def _entries(logits: Tensor, entries: Iterable[tuple[int, int, float]]) -> tuple[tuple[Tensor, Tensor], Tensor] | None:
    """(row, id, value) triples as an index into `logits` and the values; ids are distinct within a row."""
    listed = list(entries)
    if not listed:
        return None
    rows, ids, values = zip(*listed, strict=True)
    device = logits.device
    index = on_device([rows, ids], device)
    return (index[0], index[1]), on_device(values, device, logits.dtype)


def _seen(row: RowPlan) -> set[int]:
    return set(row.history) if row.sampling.repetition_penalty != 1.0 else set()


def _output_penalties(row: RowPlan) -> Iterable[tuple[int, float]]:
    presence, frequency = row.sampling.presence_penalty, row.sampling.frequency_penalty
    if presence or frequency:
        for token, count in Counter(row.history[row.prompt_length :]).items():
            yield token, presence + frequency * count


def _biases(rows: Sequence[RowPlan]) -> Iterable[tuple[int, int, float]]:
    for i, row in enumerate(rows):
        for token, bias in row.sampling.logit_bias.items():
            yield i, token, bias
