"""`--sweep NAME=V1,V2,...`: one job for each value, all in one batch on one base; the best by validation is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from peftmux.adapters.aside import folder_aside
from peftmux.adapters.writer import write_files
from peftmux.trainer.errors import OptionError, TrainerError
from peftmux.trainer.files.export import publish
from peftmux.trainer.files.outputs import check_out, claimed
from peftmux.trainer.jobs.file import JobSpec, in_folder, job_spec, remove_unasked_of
from peftmux.trainer.jobs.run import JobRun
from peftmux.trainer.run.loop import TrainResult

_FIXED = frozenset(
    ("out", "output_dir", "logging_dir", "eval_data", "publish", "overwrite", "resume", "dry_run", "sweep", "ensemble")
)
"""Options of the sweep as a whole."""


@dataclass(frozen=True, slots=True)
class SweptRun:
    """How one value's run ended. Its files are gone, but for the best's."""

    parameters: int
    steps: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SweepResult:
    """Every value's run, and the value that won."""

    option: str
    runs: Mapping[str, SweptRun]
    failed: Mapping[str, str]
    """Why other values have no run."""
    best: str
    kept: TrainResult
    """The best's, whose adapter is at the sweep's `out`."""

    def table(self) -> str:
        """Value, trained parameters, losses; the winner marked."""
        lines = [f"{self.option:>12} {'parameters':>12} {'train loss':>12} {'eval loss':>12}"]
        for value, run in self.runs.items():
            mark = "  <- kept" if value == self.best else ""
            train, held_out = run.metrics["train_loss"], run.metrics["eval_loss"]
            lines.append(f"{value:>12} {run.parameters:>12,} {train:>12.4f} {held_out:>12.4f}{mark}")
        lines += [f"{value:>12} {message}" for value, message in self.failed.items()]
        return "\n".join([*lines, f"best: {self.option}={self.best}: {self.kept.out}"])


def run_sweep(spec: JobSpec, given: Mapping[str, Any]) -> SweepResult:
    """Train all values and leave the best at `out`. `given`: the options by name that `spec` was made of.

    Raises OptionError for a sweep without rows to evaluate on, an unknown option, or a bad value; TrainerError where no
    value ends with a finite loss.
    """
    option, values = _parse(spec)
    with claimed(spec.options.out):
        check_out(spec.options)
        return _swept_all(spec, given, option, values)


def _swept_all(spec: JobSpec, given: Mapping[str, Any], option: str, values: Sequence[str]) -> SweepResult:
    out = Path(spec.options.out)
    plain = {name: value for name, value in given.items() if name not in ("sweep", "publish", "out", option)}
    with folder_aside(out.resolve()) as aside:
        specs = {}
        for i, value in enumerate(values):
            own = {**in_folder(plain, out, aside, str(i)), option: _meant(value)}
            specs[value] = job_spec(value, spec.method.name, own, "--sweep")
        _check_different(specs)
        run = JobRun(list(specs.values()))
        results = run.run()
        remove_unasked_of(specs.values(), plain)
        best = min(results, key=lambda value: _score(results[value]), default="")
        if not results or _score(results[best]) == math.inf:
            lost = {value: f"eval loss {result.metrics['eval_loss']}" for value, result in results.items()} | run.failed
            raise TrainerError("no value is left: " + "; ".join(f"{option}={v}: {why}" for v, why in lost.items()))
        kept = Path(specs[best].options.out)
        write_files(out, {str(f.relative_to(kept)): f.read_bytes() for f in kept.rglob("*") if f.is_file()})
    if spec.options.publish:
        publish(out, spec.options.publish)
    runs = {value: _swept(results[value]) for value in values if value in results}
    return SweepResult(option, runs, run.failed, best, replace(results[best], out=out))


def _swept(result: TrainResult) -> SweptRun:
    return SweptRun(sum(result.adapter.sites().values()), result.steps, result.metrics)


def _score(result: TrainResult) -> float:
    loss = result.metrics["eval_loss"]
    return loss if math.isfinite(loss) else math.inf


def _check_different(specs: Mapping[str, JobSpec]) -> None:
    """Raises OptionError where two values are written differently and mean the same."""
    seen: list[tuple[Any, ...]] = []
    for value, spec in specs.items():
        training = {name: given for name, given in spec.training.items() if name != "output_dir"}
        means = (spec.config, replace(spec.options, out="any"), training)
        if means in seen:
            raise OptionError("sweep", f"expected different values, got {list(specs)[seen.index(means)]} and {value}")
        seen.append(means)


def _apart(text: str) -> Iterator[str]:
    """At its commas, but for those within brackets, which make a list or a JSON object one value."""
    start = depth = 0
    for at, sign in enumerate(text):
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and depth == 0:
            yield text[start:at]
            start = at + 1
    yield text[start:]


def _meant(value: str) -> object:
    """[a, b] is a list, as in a jobs file; all else is what its flag makes of it."""
    if not (value.startswith("[") and value.endswith("]")):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise OptionError("sweep", f"{value}: {error}") from None


def _parse(spec: JobSpec) -> tuple[str, list[str]]:
    option, _, text = (spec.options.sweep or "").partition("=")
    option, values = option.strip().replace("-", "_"), [v.strip() for v in _apart(text) if v.strip()]
    if not option or len(set(values)) != len(values) or len(values) < 2:
        raise OptionError("sweep", f"expected NAME=V1,V2,... with different values, got {spec.options.sweep!r}")
    if option in _FIXED:
        raise OptionError("sweep", f"{option.replace('_', '-')} is the same for all values")
    if not spec.options.eval_data:
        raise OptionError("sweep", "needs rows to choose by: give --eval-data")
    return option, values
