"""The tokens that may be drawn: min_p and top_k, then top_p of what is left. The vocabulary is never sorted first.

Each filter keeps a head of the descending order, so together they are one threshold: what is below it cannot be drawn.
Tokens equal to the threshold are kept, all of them, which leaves no choice to the order of equal values.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import torch
from torch import Tensor

from peftmux.runtime.model.staging import on_device
from peftmux.runtime.params import SamplingParams

_WIDTHS = (64, 1024, 8192)
"""Fixed steps: how far a row has to look is its own affair, never its neighbours'."""


def is_filtered(sampling: SamplingParams) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def filtered(scores: Tensor, params: Sequence[SamplingParams]) -> list[tuple[list[int], Tensor, Tensor]]:
    """Groups of rows with the tokens left to them: (rows [G], scores [G, K], ids [G, K] int32).

    scores: [R, V] float32, each row's largest 0. Rows come back in the group of the narrowest width that holds all
    their tokens; what fills up a row's K has score -inf. Waits for the device once a width: how far the rows have to
    look decides what is launched next.
    """
    groups = []
    rows = list(range(len(params)))
    for width in (*(w for w in _WIDTHS if w < scores.shape[1]), scores.shape[1]):
        values, ids = scores.topk(width)
        threshold = _threshold(scores, values, params)
        known = [True] * len(rows) if width == scores.shape[1] else (threshold > values[:, -1]).tolist()
        kept = values.masked_fill(values < threshold[:, None], float("-inf"))
        if all(known):
            groups.append((rows, kept, ids.int()))
            break
        done, left = ([i for i, k in enumerate(known) if k is wanted] for wanted in (True, False))
        if done:
            at = on_device(done, scores.device)
            groups.append(([rows[i] for i in done], kept[at], ids[at].int()))
        rows, scores, params = (
            [rows[i] for i in left],
            scores[on_device(left, scores.device)],
            [params[i] for i in left],
        )
    return groups


def _threshold(scores: Tensor, values: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """[R]: the score below which nothing is drawn; -inf for a row whose `values` (its largest, sorted) do not tell."""
    width, vocabulary = values.shape[1], scores.shape[1]

    def column(numbers: Sequence[float]) -> Tensor:
        return on_device(numbers, scores.device, torch.float32)

    top_k = [min(p.top_k, vocabulary) or vocabulary for p in params]
    at = on_device([min(k, width) - 1 for k in top_k], scores.device)
    limited = on_device([k <= width for k in top_k], scores.device)
    lowest = values.gather(1, at[:, None]).squeeze(1).masked_fill(~limited, float("-inf"))
    lowest = torch.maximum(lowest, column([log(p.min_p) if p.min_p > 0 else float("-inf") for p in params]))
    if all(p.top_p >= 1.0 for p in params):
        return lowest

    survivors = scores.masked_fill(scores < lowest[:, None], float("-inf")).exp_().sum(1)
    wanted = column([p.top_p for p in params]) * survivors
    mass = values.masked_fill(values < lowest[:, None], float("-inf")).exp_().cumsum(1)
    reached = mass >= wanted[:, None]
    last = values.gather(1, reached.int().argmax(1, keepdim=True)).squeeze(1)
    # The mass of the survivors is known unless a top_k that lies outside `values` has still to thin them out.
    unlimited = on_device([k == vocabulary for k in top_k], scores.device)
    known = limited | unlimited | (lowest > values[:, -1])
    cuts = on_device([p.top_p < 1.0 for p in params], scores.device)
    return torch.where(cuts & known & reached[:, -1], torch.maximum(last, lowest), lowest)
