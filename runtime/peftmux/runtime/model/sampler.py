"""From logits to tokens and log-probabilities. The same code on every device; vectorised over rows of equal kind.

A row's result depends on its own logits and its own `RowPlan` only. A row whose logits are not finite (NaN, +inf, or
-inf throughout) fails alone: its token is None or its prompt log-probabilities are (), and `RowResult.answers` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peftmux.runtime.model.sampling_filters import filtered, is_filtered
from peftmux.runtime.model.sampling_noise import draw_key, log_exponential
from peftmux.runtime.model.sampling_penalties import change_logits, changes_logits
from peftmux.runtime.params import TokenLogprob
from peftmux.runtime.scheduler.plan import RowPlan

Sampled = tuple[int | None, TokenLogprob | None]

_REPORTED_AT_ONCE = 64
"""Rows of prompt logits taken to float32 together: bounds the memory of a long chunk."""
_NOISE_AT_ONCE, _CPU_NOISE_AT_ONCE = 1 << 24, 1 << 17
"""Elements of noise made together: bounds memory, and on a CPU keeps a dozen passes inside its second-level cache."""


def sample(logits: Tensor, rows: Sequence[RowPlan]) -> list[Sampled]:
    """One token for each row, with its log-probability where the row asks for it.

    logits: [R, V] in the model's dtype, unchanged; rows: the R rows that sample, in order. Temperature 0 is the argmax.
    """
    raw = logits.float()
    largest, best = raw.max(1)
    if any(row.sampling.temperature > 0 or changes_logits(row) for row in rows):
        best = _choose(raw, best, rows)
    # One transfer for both: a token, or -1 for a row that fails.
    tokens: list[int] = best.masked_fill(~largest.isfinite(), -1).tolist()
    sampled: list[Sampled] = [(token, None) if token >= 0 else (None, None) for token in tokens]
    reporting = [i for i, row in enumerate(rows) if row.output.logprobs is not None and tokens[i] >= 0]
    if reporting:
        entries = _report(
            _pick(raw, reporting), [tokens[i] for i in reporting], [rows[i].output.logprobs or 0 for i in reporting]
        )
        for i, entry in zip(reporting, entries, strict=True):
            sampled[i] = (tokens[i], entry)
    return sampled


def prompt_logprobs(logits: Tensor, targets: Sequence[int], top: int) -> tuple[TokenLogprob, ...]:
    """Log-probabilities of `targets`, the tokens that follow; () where some logits are not finite.

    logits: [N, V]; targets: N; top: alternatives for each.
    """
    entries: list[TokenLogprob] = []
    for at in range(0, len(targets), _REPORTED_AT_ONCE):
        part = logits[at : at + _REPORTED_AT_ONCE].float()
        if not part.amax(1).isfinite().all():
            return ()
        wanted = list(targets[at : at + _REPORTED_AT_ONCE])
        entries += _report(part, wanted, [top] * len(wanted))
    return tuple(entries)


def _report(raw: Tensor, tokens: list[int], tops: list[int]) -> list[TokenLogprob]:
    """raw: [N, V] float32, before temperature and penalties."""
    total = raw.logsumexp(1, keepdim=True)
    chosen = (raw.gather(1, torch.tensor(tokens, device=raw.device)[:, None]) - total).squeeze(1).tolist()
    width = min(max(tops), raw.shape[1])
    if not width:
        return [TokenLogprob(token, value) for token, value in zip(tokens, chosen, strict=True)]
    values, ids = raw.topk(width)
    alternatives = zip(ids.tolist(), (values - total).tolist(), strict=True)
    return [
        TokenLogprob(token, value, tuple(zip(top_ids[:n], top_values[:n], strict=True)))
        for token, value, n, (top_ids, top_values) in zip(tokens, chosen, tops, alternatives, strict=True)
    ]


def _choose(raw: Tensor, best: Tensor, rows: Sequence[RowPlan]) -> Tensor:
    """Tokens [R] of a batch where some rows draw or change their logits; `best` [R] is the plain argmax."""
    scores = raw
    if any(changes_logits(row) for row in rows):
        scores = raw.clone()
        change_logits(scores, rows)
        best = scores.max(1).indices
    for draw, wanted in ((_draw_free, _draws_freely), (_draw_filtered, _draws_filtered)):
        drawn = _where(rows, wanted)
        if drawn:
            best[_index(drawn, raw)] = draw(_tempered(_pick(scores, drawn), drawn, rows), [rows[i] for i in drawn])
    return best


def _draws_freely(row: RowPlan) -> bool:
    return row.sampling.temperature > 0 and not is_filtered(row.sampling)


def _draws_filtered(row: RowPlan) -> bool:
    return row.sampling.temperature > 0 and is_filtered(row.sampling)


def _tempered(scores: Tensor, drawn: Sequence[int], rows: Sequence[RowPlan]) -> Tensor:
    """(l - max l) / temperature: no temperature can make the largest overflow."""
    temperatures = torch.tensor([[rows[i].sampling.temperature] for i in drawn], device=scores.device)
    return (scores - scores.amax(1, keepdim=True)).div_(temperatures)


def _draw_free(scores: Tensor, rows: Sequence[RowPlan]) -> Tensor:
    """Any token of the vocabulary. scores: [R, V], overwritten -> [R]."""
    vocabulary = scores.shape[1]
    ids = torch.arange(vocabulary, dtype=torch.int32, device=scores.device)[None]
    keys = _keys(rows)
    step = max(1, (_CPU_NOISE_AT_ONCE if scores.device.type == "cpu" else _NOISE_AT_ONCE) // vocabulary)
    drawn = []
    for at in range(0, len(keys), step):
        race = scores[at : at + step].sub_(log_exponential(keys[at : at + step], ids))
        drawn.append(race.max(1).indices)
    return torch.cat(drawn)


def _draw_filtered(scores: Tensor, rows: Sequence[RowPlan]) -> Tensor:
    drawn = torch.empty(len(rows), dtype=torch.long, device=scores.device)
    keys = _keys(rows)
    for at, kept, ids in filtered(scores, [row.sampling for row in rows]):
        race = kept - log_exponential([keys[i] for i in at.tolist()], ids)
        drawn[at] = ids.gather(1, race.max(1, keepdim=True).indices).squeeze(1).long()
    return drawn


def _keys(rows: Sequence[RowPlan]) -> list[tuple[int, int]]:
    return [draw_key(row.sampling.seed, row.generated) for row in rows]


def _where(rows: Sequence[RowPlan], wanted: Callable[[RowPlan], bool]) -> list[int]:
    return [i for i, row in enumerate(rows) if wanted(row)]


def _index(rows: list[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, device=like.device)


def _pick(tensor: Tensor, rows: list[int]) -> Tensor:
    """Those rows of `tensor`; the tensor itself where they are all of it."""
    return tensor if len(rows) == tensor.shape[0] else tensor[_index(rows, tensor)]
