"""Passes that jobs share: one forward and one backward over micro-batches of several of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from peftmux.trainer.host.host import Host, RowsApart
from peftmux.trainer.host.random_state import RandomState
from peftmux.trainer.jobs.batch import JoinedBatch, join
from peftmux.trainer.jobs.job import Job
from peftmux.trainer.run.objective import replaced_loss

CPU_TOKENS, DEVICE_TOKENS = 512, 16384
"""As many tokens, padding included, share a pass. Past it nothing is gained: the weights' bytes no longer decide, and
a larger batch needs more memory and leaves the processor's caches."""


class Together:
    """The passes of jobs on one model.

    A job that has a pass of its own ends with the bits of its solo run. In a shared pass the same sums are added up in
    another order, so that it differs by float32's rounding and by what the method makes of that (a router that chooses
    another expert, Adam on gradients near zero): measured up to 1e-5 for most methods after 20 steps at rates of 1e-2,
    up to 1e-3 for mixtures and PiSSA. What a job draws is the same in both.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._most = CPU_TOKENS if model.device.type == "cpu" else DEVICE_TOKENS
        self._first = True
        self._apart = ""
        """Why no pass is shared; empty: they are."""

    def round(self, jobs: Sequence[Job]) -> None:
        """A pass over the micro-batch that each job wants one for; its gradients and its loss are with it then."""
        self._model.train()
        if self._first:
            self._first = False
            self._keep_apart(_bound_rows(self._model))
        for group in grouped([_size(job) for job in jobs], self._most):
            self._group([jobs[i] for i in group])

    def _group(self, jobs: Sequence[Job]) -> None:
        if len(jobs) > 1 and not self._apart:
            try:
                self._shared_pass(jobs)
            except RowsApart as error:
                self._keep_apart(str(error))
            else:
                return
        for job in jobs:
            with job.random.torch():
                self._pass([job])

    def _shared_pass(self, jobs: Sequence[Job]) -> None:
        with ExitStack() as stack:
            for job in jobs:
                stack.enter_context(job.random.restored_on(RowsApart))
            self._pass(jobs)

    def _keep_apart(self, why: str) -> None:
        self._apart = why
        if why:
            print(f"every job has passes of its own, as fast as one after another: {why}", file=sys.stderr)

    def _pass(self, jobs: Sequence[Job]) -> None:
        batch = join([job.batch for job in jobs if job.batch is not None])
        host = Host.of(self._model)
        with ExitStack() as stack:
            for job in jobs:
                stack.enter_context(job.gradients())
            counts = {job.adapter.key: rows for job, rows in zip(jobs, batch.rows, strict=True)}
            draws = {job.adapter.key: job.draws() for job in jobs} if len(jobs) > 1 else {}
            stack.enter_context(host.rows(counts, draws))
            self._loss(jobs, batch).backward()

    def _loss(self, jobs: Sequence[Job], batch: JoinedBatch) -> Tensor:
        """The sum of all jobs' losses, each over its own rows by the model's own loss function."""
        model, host = self._model, Host.of(self._model)
        own = host.loss_function

        def by_job(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
            last = labels.shape[1]
            states = [None] * len(jobs) if host.hidden is None else host.hidden[:, -last:].split(batch.rows)
            losses = []
            for job, part, target, hidden in zip(
                jobs, logits.split(batch.rows), labels.split(batch.rows), states, strict=True
            ):
                scores, size = job.adapter.scores(part, hidden, vocab_size)
                losses.append(job.loss(own, scores, target, size))
            return sum(losses[1:], losses[0])

        with replaced_loss(model, by_job):
            loss: Tensor = model(**batch.inputs()).loss
        return loss


def grouped(sizes: Sequence[tuple[int, int]], most: int) -> list[list[int]]:
    """Indices by pass: of like length together, at most `most` tokens when all are filled up to the longest.

    sizes: (rows, tokens) of each; one that is larger by itself has a pass of its own.
    """
    groups: list[list[int]] = []
    rows = 0
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i][1]):
        if groups and (rows + sizes[index][0]) * sizes[groups[-1][0]][1] <= most:
            groups[-1].append(index)
            rows += sizes[index][0]
        else:
            groups.append([index])
            rows = sizes[index][0]
    return groups


def _bound_rows(model: Any) -> str:
    """Why a batch's rows are not independent of each other in this base while it trains; empty: they are."""
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return "the base adds a loss over all rows of a batch (output_router_logits)"
    before, state = RandomState(), RandomState()
    with state.torch(), Host.of(model).only(""), torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    return "" if state.draws_as(before) else "the base draws at random while it trains (dropout, or a router's noise)"


def _size(job: Job) -> tuple[int, int]:
    assert job.batch is not None
    rows, tokens = job.batch["input_ids"].shape
    return rows, tokens
