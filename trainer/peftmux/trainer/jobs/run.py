"""`peftmux train --jobs FILE`: every job's adapter is written as soon as its last step is done."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from tqdm import tqdm

from peftmux.adapters.errors import AdapterError
from peftmux.trainer.errors import OptionError, TrainerError
from peftmux.trainer.host.host import Host
from peftmux.trainer.jobs.file import Changes, JobSpec, common_base
from peftmux.trainer.jobs.job import Job
from peftmux.trainer.jobs.together import Together
from peftmux.trainer.run.base_model import load_base
from peftmux.trainer.run.data_files import DataFiles
from peftmux.trainer.run.loop import TrainResult, finish, prepare
from peftmux.trainer.run.summary import trainable_parameters


@dataclass(slots=True)
class JobRun:
    """Jobs on one base. `results` holds those that are done, `failed` why others ended without an adapter."""

    specs: Sequence[JobSpec]
    changes: Callable[[], Changes] = Changes
    """Asked between rounds."""
    together: Callable[[Any], Together] = Together
    """What makes the passes of the model."""
    results: dict[str, TrainResult] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    _holds: dict[str, ExitStack] = field(default_factory=dict, init=False)
    """Of each job that goes on, what nobody else may write to."""

    def run(self) -> dict[str, TrainResult]:
        """Train all of them. Every job's options and data are checked before the first step; TrainerError names it.

        A job that fails later, or joins and cannot be begun, does not stop the others.
        """
        if not self.specs:
            return self.results
        model, tokenizer = load_base(common_base(self.specs), self.specs[0].training)
        jobs: list[Job] = []
        try:
            files = DataFiles()
            for spec in self.specs:
                jobs.append(self._start(spec, model, tokenizer, files))
            del files
            with _Progress() as progress:
                together = self.together(model)
                jobs[:] = [job for job in jobs if self._advance(job)]
                while jobs:
                    together.round(jobs)
                    jobs[:] = [job for job in jobs if self._advance(job)]
                    progress.show(jobs)
                    self._change(jobs, model, tokenizer)
        finally:
            for job in jobs:
                job.close()
            for holds in self._holds.values():
                holds.close()
        return self.results

    def _start(self, spec: JobSpec, model: Any, tokenizer: Any, files: DataFiles) -> Job:
        with ExitStack() as holds:
            job = _start(spec, model, tokenizer, files, holds)
            self._holds[spec.name] = holds.pop_all()
        return job

    def _advance(self, job: Job) -> bool:
        """Whether it goes on. One that has ended is written; one that cannot go on does not stop the others."""
        try:
            if job.advance():
                return True
            digest = finish(job.ready, job.metrics)
        except (TrainerError, OSError) as error:
            self._fail(job.name, str(error))
        except Exception as error:  # the other jobs are worth more than the end of this process
            traceback.print_exc()
            self._fail(job.name, f"{type(error).__name__}: {error}")
        else:
            self.failed.pop(job.name, None)  # taken out before, and put in again
            out, ready = Path(job.ready.options.out), job.ready
            self.results[job.name] = TrainResult(
                out, digest, job.step, job.metrics, ready.model, ready.tokenizer, job.adapter
            )
        self._holds.pop(job.name).close()
        job.adapter.detach()
        return False

    def _fail(self, name: str, message: str) -> None:
        self.failed[name] = message
        tqdm.write(f"{name}: {message}", file=sys.stderr)

    def _change(self, jobs: list[Job], model: Any, tokenizer: Any) -> None:
        changes = self.changes()
        for job in [job for job in jobs if job.name in changes.left]:
            jobs.remove(job)
            job.close()
            self._holds.pop(job.name).close()
            job.adapter.detach()
            self._fail(job.name, f"taken out after {job.step} of {job.total_steps} steps: no adapter written")
        files = DataFiles()
        for spec in changes.joined:
            try:
                common_base([*self.specs, spec])
                job = self._start(spec, model, tokenizer, files)
            except TrainerError as error:
                self._fail(spec.name, str(error).removeprefix(f"jobs: {spec.name}: "))
            except Exception as error:
                traceback.print_exc()
                self._fail(spec.name, f"{type(error).__name__}: {error}")
            else:
                if self._advance(job):
                    jobs.append(job)


def _start(spec: JobSpec, model: Any, tokenizer: Any, files: DataFiles, holds: ExitStack) -> Job:
    def base() -> tuple[Any, Any]:
        return model, tokenizer

    try:
        with _others_as_they_were(), Host.of(model).unless_refused():
            ready = prepare(spec.method, spec.options, spec.config, spec.training, base, files, holds)
            job = Job(spec.name, ready)
    except (TrainerError, AdapterError) as error:
        raise OptionError("jobs", f"{spec.name}: {error}") from None
    print(f"{spec.name}: {trainable_parameters(ready.adapter, ready.base_parameters)}", file=sys.stderr)
    return job


@contextmanager
def _others_as_they_were() -> Iterator[None]:
    """Reading training arguments makes accelerate forget what is so until the job has its Trainer: of a job that cannot
    be begun the others get it back."""
    shared = AcceleratorState._shared_state
    before = dict(shared)
    try:
        yield
    except BaseException:
        shared.clear()
        shared.update(before)
        raise


class _Progress:
    """A bar over all steps of all jobs, where there is a terminal."""

    def __init__(self) -> None:
        self._bar = tqdm(unit="step", disable=not sys.stderr.isatty())
        self._steps: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, jobs: Sequence[Job]) -> None:
        """jobs: those that go on."""
        ended = self._steps.keys() - {job.name for job in jobs}
        self._steps |= {name: (total, total) for name, (_, total) in self._steps.items() if name in ended}
        self._steps |= {job.name: (job.step, job.total_steps) for job in jobs}
        self._bar.total = sum(total for _, total in self._steps.values())
        self._bar.set_postfix({"jobs": len(jobs)}, refresh=False)
        self._bar.update(sum(step for step, _ in self._steps.values()) - self._bar.n)
