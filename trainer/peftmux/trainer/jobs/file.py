"""Jobs from a YAML file: `defaults`, and a list of `jobs` with `name`, `method` and any option by its flag's name."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from peftmux.trainer.config_file import flags
from peftmux.trainer.errors import OptionError
from peftmux.trainer.huggingface_trainer import newest_checkpoint
from peftmux.trainer.methods import Method, get_method
from peftmux.trainer.options import RunOptions, build_config


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One job, checked as far as that goes without its base and its data."""

    name: str
    method: Method
    options: RunOptions
    config: Any
    training: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Changes:
    """Jobs that come, and the names of jobs that are to go."""

    joined: Sequence[JobSpec] = ()
    left: Collection[str] = ()


class JobsFile:
    """A jobs file that may change while its jobs run: an entry that is added joins, one that is taken out leaves."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._known: set[str] = set()
        self._seen: tuple[int, int] | None = None

    def read(self) -> list[JobSpec]:
        """All jobs. Raises OptionError."""
        self._seen = self._signature()
        specs = read_jobs(self._path)
        self._known = {spec.name for spec in specs}
        return specs

    def changes(self) -> Changes:
        """Since the last call; none where the file has not changed, or cannot be read just now, which is said."""
        now = self._signature()
        if now is None or now == self._seen:
            return Changes()
        known = self._known
        try:
            specs = self.read()
        except OptionError as error:
            print(f"peftmux train: {error}", file=sys.stderr, flush=True)
            return Changes()
        return Changes([spec for spec in specs if spec.name not in known], known - self._known)

    def _signature(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size


def read_jobs(path: str | Path) -> list[JobSpec]:
    """Raises OptionError naming the file, the job and the option. Jobs must have different names and folders."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError("jobs", f"{path}: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("jobs"), list) or not content["jobs"]:
        raise OptionError("jobs", f"{path}: expected `jobs`, a list, and perhaps `defaults`")
    if unknown := content.keys() - {"jobs", "defaults"}:
        raise OptionError("jobs", f"{path}: expected `jobs` and `defaults`, got {sorted(map(str, unknown))}")
    specs = [_job(path, index, entry, content.get("defaults") or {}) for index, entry in enumerate(content["jobs"])]
    for what, values in (("name", [s.name for s in specs]), ("out", [s.options.out for s in specs])):
        if twice := [value for value in values if values.count(value) > 1]:
            raise OptionError("jobs", f"{path}: expected each {what} once, got {twice[0]!r} twice")
    return specs


def _job(path: str | Path, index: int, entry: object, defaults: Mapping[str, Any]) -> JobSpec:
    where = f"{path}: job {index + 1}"
    if not isinstance(entry, dict) or not isinstance(defaults, dict):
        raise OptionError("jobs", f"{where}: expected options by name, found {type(entry).__name__}")
    given = {str(k).replace("-", "_"): v for k, v in {**defaults, **entry}.items()}
    name, method = given.pop("name", None), given.pop("method", None)
    if not isinstance(name, str) or not name or not isinstance(method, str):
        raise OptionError("jobs", f"{where}: expected a name and a method, got {name!r} and {method!r}")
    try:
        return job_spec(name, method, given, f"{where} ({name})")
    except OptionError as error:
        raise OptionError("jobs", f"{where} ({name}): {error}") from None


def job_spec(name: str, method: str, given: Mapping[str, Any], where: str) -> JobSpec:
    """A job from options by name, each read as its flag would be."""
    from peftmux.trainer.cli import build_parser, parse

    chosen = get_method(method)
    parser = build_parser(method)
    values = parse(parser, flags(parser, given, where))
    return split_options(name, chosen, values)


def split_options(name: str, method: Method, values: dict[str, Any]) -> JobSpec:
    """Parsed options to those of the run, of the method, and of the training."""
    values = dict(values)
    run = {f.name: values.pop(f.name) for f in dataclasses.fields(RunOptions) if f.name in values}
    own = {f.name: values.pop(f.name) for f in dataclasses.fields(method.config_class) if f.name in values}
    return JobSpec(name, method, build_config(RunOptions, run), build_config(method.config_class, own), values)


def resumed(specs: Sequence[JobSpec]) -> list[JobSpec]:
    """The jobs that are not done yet; each goes on from its newest checkpoint, or begins where it has none."""
    left = []
    for spec in specs:
        out = Path(spec.options.out)
        if (out / "adapter_config.json").exists():
            print(f"{spec.name}: done before: {out}", file=sys.stderr, flush=True)
            continue
        folder = Path(spec.training.get("output_dir") or f"{out}.checkpoints")
        resume = newest_checkpoint(folder) is not None
        left.append(replace(spec, options=replace(spec.options, resume=resume)))
    return left


def common_base(specs: Sequence[JobSpec]) -> RunOptions:
    """The options that load the base, which all jobs share. Raises OptionError where they differ."""
    first = specs[0].options
    for spec in specs[1:]:
        for field in ("model", "dtype", "attn_implementation"):
            if getattr(spec.options, field) != getattr(first, field):
                got = getattr(spec.options, field)
                raise OptionError(field, f"expected {getattr(first, field)!r} for every job, {spec.name} has {got!r}")
    return first
