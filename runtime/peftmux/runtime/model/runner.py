"""Launches steps: the plan's plain values to tensors, through the model, to tokens and log-probabilities."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from peftmux.kernels.lowrank import Segments, workspace
from peftmux.runtime.model.cache import PagedCache
from peftmux.runtime.model.graphs import DecodeGraphs
from peftmux.runtime.model.images import attention_rows, image_vectors
from peftmux.runtime.model.launched import Launched, predicting
from peftmux.runtime.model.loaded import LoadedModel
from peftmux.runtime.model.sites import Site
from peftmux.runtime.model.staging import to_device
from peftmux.runtime.model.step import SlotRows, StepInputs
from peftmux.runtime.model.virtual import joined, virtual_vectors
from peftmux.runtime.scheduler.plan import RowPlan, StepPlan, StepResult

BASE_SLOT = 0


class Runner:
    """Owns the paged cache. Used by one thread."""

    def __init__(
        self, model: LoadedModel, num_blocks: int, block_size: int, graphs: DecodeGraphs | None = None
    ) -> None:
        """graphs: what replays steps that only decode; None runs every step as it comes."""
        self.model = model
        self.cache = PagedCache(model, num_blocks, block_size)
        self.cache.attach()
        self.graphs = graphs
        self._first_pass = model.first_pass
        self._first_pass.bind(lambda: PagedCache(model, num_blocks, block_size))
        model.ladders.bind(num_blocks, block_size)

    def run(self, plan: StepPlan) -> StepResult:
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan, before: Launched | None = None) -> Launched:
        """Start a step; its result may be taken later. `before`: the last step, where rows await what it draws."""
        self.cache.copy(plan.copies)
        if self.graphs is not None and self.graphs.takes(plan.rows):
            return Launched(plan.rows, self.graphs.run(plan.rows, self.cache, before), None, self.model.heads)
        inputs = self._inputs(plan.rows, before)
        if not self._first_pass.empty:
            inputs = self._with_shares(inputs, plan, before)
        logits = self.model.forward(inputs)
        states = None if inputs.states is None else self.model.states(inputs)
        return Launched(plan.rows, logits, states, self.model.heads)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture what can be, so that no request waits for it. In the thread that runs steps, before the first."""
        if self.graphs is not None:
            self.graphs.warm_up()

    def close(self) -> None:
        """The thread that ran steps ends: what its kernels took is given back."""
        workspace.release()

    def placed(self, slot: int, sites: Collection[Site]) -> None:
        """An adapter has been put into these sites, between steps."""
        if self.graphs is not None:
            self.graphs.placed(slot, sites)

    def removed(self, slot: int, sites: Collection[Site]) -> None:
        """An adapter has been dropped from these sites, between steps."""
        if self.graphs is not None:
            self.graphs.removed(slot, sites)

    def _with_shares(self, inputs: StepInputs, plan: StepPlan, before: Launched | None) -> StepInputs:
        """Run the base model over the rows whose experts' shares it decides, in its own cache."""
        first = self._first_pass
        assert first.cache is not None, "made when the first such adapter was prepared"
        first.cache.copy(plan.copies)
        rows = [row for row in plan.rows if row.slot in first]
        if not rows:
            return inputs
        first.cache.attach()
        try:
            hidden = self.model.hidden(self._inputs([replace(row, slot=BASE_SLOT) for row in rows], before))
        finally:
            self.cache.attach()
        shares = first.shares(hidden, [row.slot for row in rows], [len(row.tokens) for row in rows])
        return replace(inputs, shares=shares)

    @torch.inference_mode()
    def compute(self, rows: Sequence[RowPlan], embeddings: Tensor) -> None:
        """Keys and values of tokens that are vectors: embeddings [T, D], of the rows' tokens in order."""
        self.model.compute(self._inputs(rows), embeddings)

    def _inputs(self, rows: Sequence[RowPlan], before: Launched | None = None) -> StepInputs:
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
            wanted = predicting(row)
            keep += [first + i for i in wanted]
            read += [first + i for i in row.reads]
            passive = row.active_from - row.start
            tokens.add(row.slot, passive, len(row.tokens))
            kept.add(row.slot, sum(i < passive for i in wanted) if passive > 0 else 0, len(wanted))
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
        staged = to_device([ids, positions, cache_slots, keep, read], device)
        if before is not None:
            before.fill_in(staged[0], rows)
        return StepInputs(
            ids=staged[0].unsqueeze(0),
            positions=staged[1].unsqueeze(0),
            slots=staged[2],
            rows=attention_rows(rows, device),
            segments=Segments.build(tokens.slots, tokens.lens, device),
            keep=staged[3],
            kept=Segments.build(kept.slots, kept.lens, device),
            states=staged[4] if read else None,
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
