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
from peftmux.runtime.model.staging import Readback, on_device
from peftmux.runtime.params import TokenLogprob
from peftmux.runtime.scheduler.plan import RowPlan

Sampled = tuple[int | None, TokenLogprob | None]

_REPORTED_AT_ONCE = 64
"""Rows of prompt logits taken to float32 together: bounds the memory of a long chunk."""
_NOISE_AT_ONCE, _CPU_NOISE_AT_ONCE = 1 << 24, 1 << 17
"""Elements of noise made together: bounds memory, and on a CPU keeps a dozen passes inside its second-level cache."""


class Drawn:
    """One token for each row that samples, with its log-probability where the row asks for it.

    Everything is computed and on its way to the host when this is made; `read` waits for it.
    """

    def __init__(self, logits: Tensor, rows: Sequence[RowPlan]) -> None:
        """logits: [R, V] in the model's dtype, unchanged; rows: the R rows, in order. Temperature 0 is the argmax."""
        raw = logits.float()
        largest, best = raw.max(1)
        if any(row.sampling.temperature > 0 or changes_logits(row) for row in rows):
            best = _choose(raw, best, rows)
        self.tokens = best
        """[R] int64 on the device, of the vocabulary also for a row that fails: the next step may read them there."""
        answers = best.masked_fill(~largest.isfinite(), -1)
        self._tops = {i: row.output.logprobs for i, row in enumerate(rows) if row.output.logprobs is not None}
        self._readback = Readback(self._with_report(answers, raw) if self._tops else answers)

    def _with_report(self, answers: Tensor, raw: Tensor) -> Tensor:
        """What is reported beside the tokens, so that all is one transfer: float64 holds ids and float32 exactly."""
        reporting = list(self._tops)
        report = _report(_pick(raw, reporting), _pick(self.tokens, reporting), max(self._tops.values()))
        return torch.cat([part.flatten().double() for part in (answers, *report)])

    def read(self) -> list[Sampled]:
        """By row: (None, None) for one whose logits are not finite."""
        values = self._readback.tolist()
        count = len(self.tokens)
        tokens = [int(value) for value in values[:count]]
        sampled: list[Sampled] = [(token, None) if token >= 0 else (None, None) for token in tokens]
        if self._tops:
            reporting = [tokens[i] for i in self._tops]
            entries = _entries(values[count:], reporting, list(self._tops.values()))
            for i, entry in zip(self._tops, entries, strict=True):
                if tokens[i] >= 0:
                    sampled[i] = (tokens[i], entry)
        return sampled


def sample(logits: Tensor, rows: Sequence[RowPlan]) -> list[Sampled]:
    """`Drawn`, waited for."""
    return Drawn(logits, rows).read()


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
        report = _report(part, on_device(wanted, part.device), top)
        values = torch.cat([piece.flatten().double() for piece in report]).tolist()
        entries += _entries(values, wanted, [top] * len(wanted))
    return tuple(entries)


def _report(raw: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, ...]:
    """raw: [N, V] float32, before temperature and penalties; tokens: [N] -> log-probabilities [N], and with `top` the
    likeliest tokens' and their ids, [N, K] each."""
    total = raw.logsumexp(1, keepdim=True)
    chosen = raw.gather(1, tokens[:, None]) - total
    if not top:
        return (chosen,)
    values, ids = raw.topk(min(top, raw.shape[1]))
    return chosen, values - total, ids


def _entries(report: Sequence[float], tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    """What `_report` has found, flattened, for rows that want so many alternatives each."""
    count = len(tokens)
    width = (len(report) - count) // (2 * count)
    ids_at = count + count * width
    entries = []
    for i, (token, top) in enumerate(zip(tokens, tops, strict=True)):
        first, last = i * width, i * width + min(top, width)
        values, ids = report[count + first : count + last], report[ids_at + first : ids_at + last]
        entries.append(TokenLogprob(token, report[i], tuple(zip(map(int, ids), values, strict=True))))
    return entries


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
    temperatures = on_device([[rows[i].sampling.temperature] for i in drawn], scores.device)
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
        race = kept - log_exponential([keys[i] for i in at], ids)
        chosen = ids.gather(1, race.max(1, keepdim=True).indices).squeeze(1).long()
        if len(at) == len(rows):
            return chosen
        drawn[_index(at, scores)] = chosen
    return drawn


def _keys(rows: Sequence[RowPlan]) -> list[tuple[int, int]]:
    return [draw_key(row.sampling.seed, row.generated) for row in rows]


def _where(rows: Sequence[RowPlan], wanted: Callable[[RowPlan], bool]) -> list[int]:
    return [i for i, row in enumerate(rows) if wanted(row)]


def _index(rows: list[int], like: Tensor) -> Tensor:
    return on_device(rows, like.device)


def _pick(tensor: Tensor, rows: list[int]) -> Tensor:
    """Those rows of `tensor`; the tensor itself where they are all of it."""
    return tensor if len(rows) == tensor.shape[0] else tensor[_index(rows, tensor)]
