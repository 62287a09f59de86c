"""A round of jobs: one micro-batch of every job, one forward, one backward, each optimiser by itself."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from peftmux.trainer.host import Host
from peftmux.trainer.jobs.batch import JoinedBatch, join
from peftmux.trainer.jobs.job import Job
from peftmux.trainer.objective import replaced_loss


class Together:
    """Jobs that share one model. They join and leave between rounds."""

    def __init__(self, model: Any, pad_id: int) -> None:
        self._model = model
        self._pad_id = pad_id
        self._crop = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.jobs: list[Job] = []

    def round(self) -> None:
        """One micro-batch of every job."""
        jobs = list(self.jobs)
        batch = join([job.next_batch() for job in jobs], self._pad_id)
        self._model.train()
        host = Host.of(self._model)
        with host.rows({job.adapter.key: rows for job, rows in zip(jobs, batch.rows, strict=True)}):
            self._loss(jobs, batch).backward()
        for job in jobs:
            job.after_backward()

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
            loss: Tensor = model(**batch.inputs(self._crop)).loss
        return loss
