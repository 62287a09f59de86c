"""`--ensemble N`: N adapters of one configuration from N seeds, all in one batch on one base.

Prompt ensembling (Lester et al., 2021, arXiv 2104.08691, section 6): many prompts on one frozen base. Each member is an
adapter of its own, saved and served as any other. The vote is the client's: it asks all members the same, which the
server answers in one batch, and takes the answer that most of them gave. Members differ by their seed: the order of the
data, dropout, and the start where it is drawn (for prompts `--prompt-init vocabulary` or `random`; `data`, `text` and
`labels` start all of them alike).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftmux.adapters.aside import folder_aside, put_in_place
from peftmux.trainer.errors import OptionError, TrainerError
from peftmux.trainer.files.export import publish
from peftmux.trainer.files.outputs import check_out, claimed, published_names
from peftmux.trainer.jobs.file import JobSpec, in_folder, job_spec, remove_unasked_of
from peftmux.trainer.jobs.run import JobRun
from peftmux.trainer.run.loop import TrainResult

_SEED = 42
"""transformers' own default."""


@dataclass(frozen=True, slots=True)
class EnsembleResult:
    """The members by their folders' names below `out`."""

    members: Mapping[str, TrainResult]
    out: Path

    def table(self) -> str:
        lines = [f"{'member':>8} {'train loss':>12} {'eval loss':>12}"]
        for name, run in self.members.items():
            held_out = run.metrics.get("eval_loss")
            shown = "" if held_out is None else f"{held_out:.4f}"
            lines.append(f"{name:>8} {run.metrics['train_loss']:>12.4f} {shown:>12}")
        lines.append(f"ensemble of {len(self.members)}: {self.out}")
        lines.append("each is an adapter of its own: ask all of them the same, and take the answer that most give")
        return "\n".join(lines)


def run_ensemble(spec: JobSpec, given: Mapping[str, Any]) -> EnsembleResult:
    """Train all members and leave them in `out`, in folders 0, 1, ...; with --publish as NAME-0, NAME-1, ...

    `given`: the options by name that `spec` was made of. All of them or none: TrainerError where one diverges.
    """
    with claimed(spec.options.out):
        check_out(spec.options)
        _check_members(Path(spec.options.out).resolve())
        return _trained(spec, given, spec.options.ensemble or 0)


def _trained(spec: JobSpec, given: Mapping[str, Any], count: int) -> EnsembleResult:
    out = Path(spec.options.out)
    place = out.resolve()  # a link stays, and what it leads to is replaced
    seed = int(given.get("seed", _SEED))
    plain = {name: value for name, value in given.items() if name not in ("ensemble", "publish", "out", "seed")}
    with folder_aside(place) as aside:
        own = [{**in_folder(plain, out, aside / "new", str(i)), "seed": seed + i} for i in range(count)]
        specs = [job_spec(str(i), spec.method.name, o, "--ensemble") for i, o in enumerate(own)]
        run = JobRun(specs)
        results = run.run()
        remove_unasked_of(specs, plain)
        if run.failed:
            raise TrainerError("; ".join(f"member {name}: {message}" for name, message in run.failed.items()))
        put_in_place(aside, place)
    if spec.options.publish:
        for i, name in enumerate(published_names(spec.options)):
            publish(out / str(i), spec.options.publish, name)
    members = {name: dataclasses.replace(result, out=out / name) for name, result in results.items()}
    return EnsembleResult({str(i): members[str(i)] for i in range(count)}, out)


def _check_members(out: Path) -> None:
    """An older ensemble is replaced as a whole; nothing else may be lost with it. out: resolved."""
    if Path.cwd().is_relative_to(out) or out.is_mount():
        what = "a mount" if out.is_mount() else "the current directory"
        raise OptionError("out", f"an ensemble's folder is replaced as a whole, {out} is {what}: give a folder in it")
    others = sorted(path.name for path in out.iterdir() if not path.name.isdigit()) if out.is_dir() else []
    if others:
        raise OptionError("out", f"expected nothing or an older ensemble at {out}, found {others[0]}")
