"""LoRA jobs in one batch against the same jobs one after another: seconds of training rounds alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.train_inputs import Size
from peftmux.trainer.jobs.file import JobSpec, job_spec
from peftmux.trainer.jobs.job import Job
from peftmux.trainer.jobs.run import JobRun
from peftmux.trainer.jobs.together import Together


class Timed(Together):
    """Notes when each round begins. The first is not counted; everything that a job does between rounds is."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._begun: list[float] = []

    @property
    def seconds(self) -> float:
        return self._begun[-1] - self._begun[1]

    def round(self, jobs: Sequence[Job]) -> None:
        self._begun.append(time.perf_counter())
        super().round(jobs)


def compare_jobs(folder: Path, size: Size, rows: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Loading, attaching and writing are left out: one after another they would cost the base's loading each time."""
    specs = job_specs(folder, size, rows, tokens)
    seconds(specs[:1])
    together, apart = [], []
    for number in range(rounds):
        for at_once in (True, False) if number % 2 == 0 else (False, True):
            if at_once:
                together.append(seconds(specs))
            else:
                apart.append(sum(seconds([one]) for one in specs))
    return {
        "jobs": len(specs),
        "rows": rows,
        "tokens": tokens,
        "steps": size.job_steps(rows, tokens),
        "together_seconds": together,
        "in_sequence_seconds": apart,
        "speed_ratio": statistics.median(b / a for a, b in zip(together, apart, strict=True)),
    }


def seconds(specs: Sequence[JobSpec]) -> float:
    made: list[Timed] = []

    def timed(model: Any) -> Timed:
        made.append(Timed(model))
        return made[-1]

    run = JobRun(specs, together=timed)
    run.run()
    assert not run.failed
    return made[0].seconds


def job_specs(folder: Path, size: Size, rows: int, tokens: int) -> list[JobSpec]:
    common = {
        "model": str(folder / "base"),
        "data": str(folder / f"jobs-{rows}x{tokens}.jsonl"),
        "overwrite": True,
        "max_steps": size.job_steps(rows, tokens),
        "per_device_train_batch_size": rows,
        "disable_tqdm": True,
    }
    return [
        job_spec(f"j{i}", "lora", {**common, "seed": i, "out": str(folder / "jobs" / f"j{i}")}, "benchmark")
        for i in range(size.job_count)
    ]
