"""`peftmux train --jobs FILE`: every job's adapter is written as soon as its last step is done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import Trainer

from peftmux.trainer.base_model import load_base
from peftmux.trainer.errors import OptionError, TrainerError
from peftmux.trainer.host import Host
from peftmux.trainer.jobs.file import JobSpec, common_base
from peftmux.trainer.jobs.job import Job
from peftmux.trainer.jobs.together import Together
from peftmux.trainer.loop import TrainResult, finish, prepare
from peftmux.trainer.prepared import Prepared, make_trainer


@dataclass(slots=True)
class JobRun:
    """Jobs on one base. `results` holds those that are done, `failed` the messages of those that could not go on."""

    specs: Sequence[JobSpec]
    more: Callable[[], Sequence[JobSpec]] = lambda: ()
    """Asked between rounds for jobs that join."""
    together: Callable[[Any, int], Together] = Together
    """What runs their rounds, of the model and the padding's id."""
    results: dict[str, TrainResult] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    _prepared: dict[str, Prepared] = field(default_factory=dict)

    def run(self) -> dict[str, TrainResult]:
        """Train all of them. Every job's options and data are checked before the first step; TrainerError names it."""
        model, tokenizer = load_base(common_base(self.specs))
        jobs = [self._start(spec, model, tokenizer) for spec in self.specs]
        pad_id = next(iter(self._prepared.values())).tokenizer.pad_token_id or 0
        with _Progress(jobs) as progress:
            together = self.together(model, pad_id)
            together.jobs = list(jobs)
            while together.jobs:
                together.round()
                progress.show(together.jobs)
                for job in [job for job in together.jobs if job.done]:
                    together.jobs.remove(job)
                    self._finish(job)
                for spec in self.more():
                    common_base([*self.specs, spec])
                    together.jobs.append(self._start(spec, model, tokenizer))
        return self.results

    def _start(self, spec: JobSpec, model: Any, tokenizer: Any) -> Job:
        if spec.options.packing:
            raise OptionError("jobs", f"{spec.name}: packing is for a run of its own")
        try:
            ready = prepare(spec.method, spec.options, spec.config, spec.training, lambda: (model, tokenizer))
        except TrainerError as error:
            raise OptionError("jobs", f"{spec.name}: {error}") from None
        if ready.args.world_size > 1:
            message = f"are trained in one process, got {ready.args.world_size}: give each its own file of jobs"
            raise OptionError("jobs", message)
        self._prepared[spec.name] = ready
        return Job(spec.name, make_trainer(ready))

    def _finish(self, job: Job) -> None:
        """Evaluate and write one job; one that diverged does not stop the others."""
        ready = self._prepared[job.name]
        metrics = {"train_loss": job.mean_loss(), "train_runtime": job.seconds()}
        if ready.eval_data:
            with Host.of(ready.model).only(job.adapter.key):
                metrics |= _evaluate(job.trainer)
        try:
            digest = finish(ready, metrics)
        except TrainerError as error:
            self.failed[job.name] = str(error)
        else:
            out = Path(ready.options.out)
            self.results[job.name] = TrainResult(
                out, digest, job.step, metrics, ready.model, ready.tokenizer, job.adapter
            )
        job.adapter.detach()


def _evaluate(trainer: Trainer) -> dict[str, float]:
    metrics = trainer.evaluate()
    return {name: value for name, value in metrics.items() if name not in ("total_flos", "epoch")}


class _Progress:
    """A bar over all steps of all jobs where there is a terminal, a line now and then where there is none."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._bar = tqdm(total=sum(job.total_steps for job in jobs), unit="step", disable=not sys.stderr.isatty())
        self._done = 0
        self._rounds = 0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, jobs: Sequence[Job]) -> None:
        self._rounds += 1
        if not self._bar.disable:
            self._bar.set_postfix({job.name: f"{job.mean_loss():.3f}" for job in jobs[:4]}, refresh=False)
            self._bar.update(len(jobs))
        elif self._rounds % 10 == 0:
            words = " ".join(f"{job.name}={job.step}/{job.total_steps}:{job.mean_loss():.4g}" for job in jobs)
            print(f"round {self._rounds} {words}", file=sys.stderr, flush=True)
