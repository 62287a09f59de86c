"""Runs one step: the plan's plain values to tensors, through the model, to tokens and log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from peftmux.kernels.lowrank import Segments
from peftmux.runtime.model.cache import PagedCache
from peftmux.runtime.model.images import attention_rows, image_vectors
from peftmux.runtime.model.loaded import LoadedModel
from peftmux.runtime.model.sampler import prompt_logprobs, sample
from peftmux.runtime.model.states import read_out
from peftmux.runtime.model.step import SlotRows, StepInputs, index_tensor
from peftmux.runtime.model.virtual import joined, virtual_vectors
from peftmux.runtime.params import State, TokenLogprob
from peftmux.runtime.scheduler.plan import RowPlan, RowResult, StepPlan, StepResult

BASE_SLOT = 0


class Runner:
    """Owns the paged cache. Used by one thread."""

    def __init__(self, model: LoadedModel, num_blocks: int, block_size: int) -> None:
        self.model = model
        self.cache = PagedCache(model, num_blocks, block_size)
        self.cache.attach()
        self._first_pass = model.first_pass
        self._first_pass.bind(lambda: PagedCache(model, num_blocks, block_size))
        model.ladders.bind(num_blocks, block_size)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        self.cache.copy(plan.copies)
        inputs = self._inputs(plan.rows)
        if not self._first_pass.empty:
            inputs = self._with_shares(inputs, plan)
        logits = self.model.forward(inputs)
        states: Mapping[int, tuple[State, ...]] = {}
        if inputs.states is not None:
            states = read_out(self.model.states(inputs), plan.rows, self.model.heads)
        return StepResult(_results(plan.rows, logits, states))

    def _with_shares(self, inputs: StepInputs, plan: StepPlan) -> StepInputs:
        """Run the base model over the rows whose experts' shares it decides, in its own cache."""
        first = self._first_pass
        assert first.cache is not None, "made when the first such adapter was prepared"
        first.cache.copy(plan.copies)
        rows = [row for row in plan.rows if row.slot in first]
        if not rows:
            return inputs
        first.cache.attach()
        try:
            hidden = self.model.hidden(self._inputs([replace(row, slot=BASE_SLOT) for row in rows]))
        finally:
            self.cache.attach()
        shares = first.shares(hidden, [row.slot for row in rows], [len(row.tokens) for row in rows])
        return replace(inputs, shares=shares)

    @torch.inference_mode()
    def compute(self, rows: Sequence[RowPlan], embeddings: Tensor) -> None:
        """Keys and values of tokens that are vectors: embeddings [T, D], of the rows' tokens in order."""
        self.model.compute(self._inputs(rows), embeddings)

    def _inputs(self, rows: Sequence[RowPlan]) -> StepInputs:
        device = self.model.device
        ids: list[int] = []
        positions: list[int] = []
        cache_slots: list[int] = []
        keep: list[int] = []
        read: list[int] = []
        tokens, kept = _Runs(), _Runs()
        for row in rows:
            first, stop = len(ids), row.start + len(row.tokens)
            ids += row.tokens
            positions += range(row.start + row.position_offset, stop + row.position_offset)
            cache_slots += self.cache.slots(row.blocks, row.start, stop)
            predicting = _predicting(row)
            keep += [first + i for i in predicting]
            read += [first + i for i in row.reads]
            passive = row.active_from - row.start
            tokens.add(row.slot, passive, len(row.tokens))
            kept.add(row.slot, sum(i < passive for i in predicting) if passive > 0 else 0, len(predicting))
        vectors = None
        if not self.model.virtual.empty:
            vectors = virtual_vectors(rows, self.model.virtual)
        if any(row.images for row in rows):
            vectors = joined(vectors, image_vectors(rows, self.model.vision))
        ladders: Mapping[int, SlotRows] = {}
        if not self.model.ladders.empty:
            ladders = self.model.ladders.rows(rows, positions, cache_slots)
        if vectors is not None:
            ids = [max(token, 0) for token in ids]
        return StepInputs(
            ids=index_tensor(ids, device).unsqueeze(0),
            positions=index_tensor(positions, device).unsqueeze(0),
            slots=index_tensor(cache_slots, device),
            rows=attention_rows(rows, device),
            segments=Segments.build(tokens.slots, tokens.lens, device),
            keep=index_tensor(keep, device),
            kept=Segments.build(kept.slots, kept.lens, device),
            states=index_tensor(read, device) if read else None,
            vectors=vectors,
            ladders=ladders,
        )


class _Runs:
    """Adapter slots and token counts of consecutive runs of the flat batch."""

    def __init__(self) -> None:
        self.slots: list[int] = []
        self.lens: list[int] = []

    def add(self, slot: int, passive: int, count: int) -> None:
        """`count` tokens of one row, the first `passive` of them (if any) before its adapter becomes active."""
        if passive > 0:
            self.slots.append(0)
            self.lens.append(min(passive, count))
            count -= min(passive, count)
        self.slots.append(slot)
        self.lens.append(count)


def _predicting(row: RowPlan) -> list[int]:
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


def _results(rows: Sequence[RowPlan], logits: Tensor, states: Mapping[int, tuple[State, ...]]) -> tuple[RowResult, ...]:
    """logits: [S, V], the rows' predicting tokens in order; states: by row."""
    sampling = [row for row in rows if row.samples]
    prompts: dict[int, tuple[TokenLogprob, ...]] = {}
    drawn_from: list[int] = []
    at = 0
    for row in rows:
        if row.next_tokens:
            part = logits[at : at + len(row.next_tokens)]
            prompts[row.row] = _reported(row, part)
            at += len(row.next_tokens)
        if row.samples:
            drawn_from.append(at)
            at += 1
    if prompts:
        logits = logits[drawn_from]
    drawn = dict(zip((r.row for r in sampling), sample(logits, sampling), strict=True)) if sampling else {}
    results = []
    for row in rows:
        token, logprob = drawn.get(row.row, (None, None))
        results.append(RowResult(row.row, token, logprob, prompts.get(row.row, ()), states.get(row.row, ())))
    return tuple(results)
