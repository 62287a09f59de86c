"""A step that has been launched: what its rows draw, and its result when that has reached the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from peftmux.kernels.head import HeadSite
from peftmux.runtime.model.sampler import Drawn, Sampled, prompt_logprobs
from peftmux.runtime.model.staging import to_device
from peftmux.runtime.model.states import read_out
from peftmux.runtime.params import State, TokenLogprob
from peftmux.runtime.scheduler.plan import RowPlan, RowResult, StepResult


class Launched:
    """Made by `Runner.launch`, in its thread; `result` is taken there too, once."""

    def __init__(self, rows: Sequence[RowPlan], logits: Tensor, states: Tensor | None, heads: HeadSite) -> None:
        """logits: [S, V], the rows' predicting tokens in order; they may be overwritten by the next step.
        states: [N, D] of the rows' read tokens."""
        self._rows = rows
        self._states = states
        self._heads = heads
        sampling = [row for row in rows if row.samples]
        self._prompts: list[tuple[RowPlan, Tensor]] = []
        drawn_from: list[int] = []
        at = 0
        for row in rows:
            if row.next_tokens:
                self._prompts.append((row, logits[at : at + len(row.next_tokens)]))
                at += len(row.next_tokens)
            if row.samples:
                drawn_from.append(at)
                at += 1
        if self._prompts:
            logits = logits[drawn_from]
        self._order = {row.row: i for i, row in enumerate(sampling)}
        self._drawn = Drawn(logits, sampling) if sampling else None

    def fill_in(self, ids: Tensor, rows: Sequence[RowPlan]) -> None:
        """Write the tokens drawn here into a later step's `ids` [T], flat, where its rows await them."""
        at, source, first = [], [], 0
        for row in rows:
            if row.awaits:
                at.append(first + len(row.tokens) - 1)
                source.append(self._order[row.row])
            first += len(row.tokens)
        if at:
            assert self._drawn is not None
            where, index = to_device([at, source], ids.device)
            ids.index_copy_(0, where, self._drawn.tokens.index_select(0, index))

    @torch.inference_mode()
    def result(self) -> StepResult:
        """Waits for this step, and for nothing that was launched after it unless its rows read prompts or states."""
        drawn: dict[int, Sampled] = {}
        if self._drawn is not None:
            drawn = dict(zip(self._order, self._drawn.read(), strict=True))
        prompts = {row.row: _reported(row, logits) for row, logits in self._prompts}
        states: Mapping[int, tuple[State, ...]] = {}
        if self._states is not None:
            states = read_out(self._states, self._rows, self._heads)
        results = []
        for row in self._rows:
            token, logprob = drawn.get(row.row, (None, None))
            results.append(RowResult(row.row, token, logprob, prompts.get(row.row, ()), states.get(row.row, ())))
        return StepResult(tuple(results))


def predicting(row: RowPlan) -> list[int]:
    """The row's tokens whose logits are needed: those that predict prompt tokens, then the one that samples."""
    first = row.prompt_logprobs_from
    indices = list(range(first, first + len(row.next_tokens)))
    if row.samples:
        indices.append(len(row.tokens) - 1)
    return indices


def _reported(row: RowPlan, logits: Tensor) -> tuple[TokenLogprob, ...]:
    """Of the prompt tokens that this step predicts. A virtual token predicts nothing, and nothing predicts one."""
    following = row.next_tokens
    top = row.output.prompt_logprobs or 0
    own = row.tokens[row.prompt_logprobs_from : row.prompt_logprobs_from + len(following)]
    if min(min(own), min(following)) >= 0:
        return prompt_logprobs(logits, following, top)
    entries = prompt_logprobs(logits, [max(token, 0) for token in following], top)
    return tuple(
        entry if before >= 0 and after >= 0 else TokenLogprob(after, None)
        for before, after, entry in zip(own, following, entries, strict=False)
    )
