"""Jobs from a YAML file: `defaults`, and a list of `jobs` with `name`, `method` and any option by its flag's name."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from peftmux.adapters.aside import remove_leftovers
from peftmux.adapters.errors import AdapterError
from peftmux.adapters.files import open_adapter
from peftmux.trainer.errors import OptionError
from peftmux.trainer.files.export import is_published, publish
from peftmux.trainer.files.outputs import adapter_name, published_place
from peftmux.trainer.methods import Method, get_method, unaliased
from peftmux.trainer.run.checkpoints import CHECKPOINT_LAST, newest_checkpoint
from peftmux.trainer.run.loop import remove_unasked
from peftmux.trainer.settings.arguments import folder_beside
from peftmux.trainer.settings.config_file import flags
from peftmux.trainer.settings.options import SEVERAL, RunOptions, build_config
from peftmux.trainer.settings.parser import build_parser, parse
from peftmux.trainer.settings.split import split
from peftmux.trainer.settings.yaml_file import line_of, read_yaml


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
        self._known: dict[str, JobSpec] = {}
        self._seen: tuple[int, int] | None = None

    def read(self) -> list[JobSpec]:
        """All jobs. Raises OptionError."""
        return self._read(at_least=1)

    def _read(self, at_least: int) -> list[JobSpec]:
        self._seen = self._signature()
        specs = read_jobs(self._path, at_least)
        self._known = {spec.name: spec for spec in specs}
        return specs

    def changes(self) -> Changes:
        """Since the last call; none where the file has not changed, or cannot be read just now, which is said."""
        now = self._signature()
        if now is None or now == self._seen:
            return Changes()
        known = self._known
        try:
            specs = self._read(at_least=0)
        except OptionError as error:
            _say(str(error))
            return Changes()
        for spec in specs:
            if spec != known.get(spec.name, spec):
                _say(f"{spec.name}: its options have changed: it goes on as it began; another name makes another job")
                self._known[spec.name] = known[spec.name]
        return Changes([spec for spec in specs if spec.name not in known], known.keys() - self._known.keys())

    def _signature(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size


def _say(text: str) -> None:
    print(f"peftmux train: {text}", file=sys.stderr, flush=True)


def read_jobs(path: str | Path, at_least: int = 1) -> list[JobSpec]:
    """Raises OptionError naming the file, the line, the job and the option. Each has a name and a folder of its own."""
    content, tree = read_yaml(path, "jobs")
    jobs = content.get("jobs") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(jobs, list) or len(jobs) < at_least:
        raise OptionError("jobs", f"{path}: expected `jobs`, a list, and perhaps `defaults`")
    if unknown := content.keys() - {"jobs", "defaults"}:
        raise OptionError("jobs", f"{path}: expected `jobs` and `defaults`, got {sorted(map(str, unknown))}")
    defaults = content.get("defaults") or {}
    if not isinstance(defaults, dict):
        raise OptionError("jobs", f"{path}: defaults: expected options by name, found {type(defaults).__name__}")
    where = [f"{path}:{line}: job {i}" for i, line in enumerate(_job_lines(tree), start=1)]
    specs = [_job(at, entry, defaults) for at, entry in zip(where, jobs, strict=True)]
    _check_apart(specs, where)
    return specs


def _check_apart(specs: Sequence[JobSpec], where: Sequence[str]) -> None:
    """Raises OptionError for two jobs of one name, or that write to one place, however it is spelled."""
    names: set[str] = set()
    places: set[Path] = set()
    for spec, at in zip(specs, where, strict=True):
        if spec.name in names:
            raise OptionError("jobs", f"{at}: expected each name once, got {spec.name!r} twice")
        names.add(spec.name)
        own = {"out": Path(spec.options.out), "output_dir": _checkpoints(spec)}
        if spec.options.publish:
            try:
                own["publish"] = published_place(spec.options.publish, adapter_name(spec.options.out))
            except OptionError as error:
                raise OptionError("jobs", f"{at}: {error}") from None
        for what, place in own.items():
            if place.resolve() in places:
                raise OptionError("jobs", f"{at}: expected its own {what}, got {str(place)!r} twice")
            places.add(place.resolve())


def _job_lines(tree: yaml.Node | None) -> list[int]:
    assert isinstance(tree, yaml.MappingNode)
    jobs = next(value for key, value in tree.value if key.value == "jobs")
    return [line_of(entry) for entry in jobs.value]


def _job(where: str, entry: object, defaults: Mapping[str, Any]) -> JobSpec:
    if not isinstance(entry, dict):
        raise OptionError("jobs", f"{where}: expected options by name, found {type(entry).__name__}")
    common, own = ({str(k).replace("-", "_"): v for k, v in options.items()} for options in (defaults, entry))
    given = {**common, **own}
    name, method = given.pop("name", None), given.pop("method", None)
    if isinstance(name, str) and "output_dir" not in own and common.get("output_dir") is not None:
        given["output_dir"] = str(Path(str(common["output_dir"])) / name)
    if not isinstance(name, str) or not name or not isinstance(method, str):
        raise OptionError("jobs", f"{where}: expected a name and a method, got {name!r} and {method!r}")
    if Path(name).name != name:
        raise OptionError("jobs", f"{where}: expected a name that can be a folder's, got {name!r}")
    method, given = unaliased(method, given)
    try:
        spec = job_spec(name, method, given, f"{where} ({name})")
        for option in SEVERAL:
            if getattr(spec.options, option) is not None:
                message = f"trains several: give each an entry, or run `peftmux train {method} --{option}`"
                raise OptionError(option, message)
    except OptionError as error:
        raise OptionError("jobs", f"{where} ({name}): {error}") from None
    return spec


def in_folder(given: Mapping[str, Any], out: Path, work: Path, name: str) -> dict[str, Any]:
    """One job's options of several that are given the same: its adapter below `work`, and a folder of its own in what
    a single run would keep beside `out`."""
    own = {**given, "out": str(work / name)}
    beside = given.get("output_dir") or folder_beside(str(out), given)
    if beside:
        own["output_dir"] = str(Path(beside) / name)
    return own


def remove_unasked_of(specs: Iterable[JobSpec], given: Mapping[str, Any]) -> None:
    """As a single run does, in the folders that `in_folder` made of `given`, which the jobs were given."""
    for spec in specs:
        training = {name: value for name, value in spec.training.items() if name != "output_dir" or name in given}
        if folder := spec.training.get("output_dir"):
            remove_unasked(spec.options, training, Path(folder))


def _checkpoints(spec: JobSpec) -> Path:
    return Path(spec.training.get("output_dir") or f"{spec.options.out}.checkpoints")


def job_spec(name: str, method: str, given: Mapping[str, Any], where: str) -> JobSpec:
    """A job from options by name, each read as its flag would be."""
    chosen = get_method(method)
    parser = build_parser(method)
    values = parse(parser, flags(parser, given, where))
    return split_options(name, chosen, values)


def split_options(name: str, method: Method, values: Mapping[str, Any]) -> JobSpec:
    """Parsed options to those of the run, of the method, and of the training."""
    run, own, training = split(method.config_class, values)
    return JobSpec(name, method, build_config(RunOptions, run), build_config(method.config_class, own), training)


def resumed(specs: Sequence[JobSpec]) -> list[JobSpec]:
    """The jobs that are not done yet; each goes on from its newest checkpoint, or begins where it has none.

    One that is done but was cut off before it was published is published. One that is to overwrite an adapter counts as
    done unless a checkpoint is newer than that: of the adapter alone nobody can tell which run it is of.
    """
    left = []
    for spec in specs:
        out = Path(spec.options.out)
        if _done(spec):
            print(f"{spec.name}: done before: {out}", file=sys.stderr, flush=True)
            if spec.options.publish and not is_published(out, spec.options.publish):
                publish(out, spec.options.publish)
            continue
        resume = newest_checkpoint(_checkpoints(spec)) is not None
        left.append(replace(spec, options=replace(spec.options, resume=resume)))
    return left


def _done(spec: JobSpec) -> bool:
    out = Path(spec.options.out)
    remove_leftovers(out.resolve())  # of one that was killed while it was put in place
    try:
        with open_adapter(out):
            pass
    except AdapterError:
        return False
    checkpoint = newest_checkpoint(_checkpoints(spec)) if spec.options.overwrite else None
    if checkpoint is None:
        return True
    written = max(path.stat().st_mtime_ns for path in out.rglob("*.safetensors"))
    return written >= (checkpoint / CHECKPOINT_LAST).stat().st_mtime_ns


def common_base(specs: Sequence[JobSpec]) -> RunOptions:
    """The options that load the base, which all jobs share. Raises OptionError where they differ."""
    first = specs[0].options
    for spec in specs[1:]:
        for field in ("model", "dtype", "quantization", "attn_implementation"):
            if getattr(spec.options, field) != getattr(first, field):
                got = getattr(spec.options, field)
                raise OptionError(
                    field.replace("_", "-"),
                    f"expected {getattr(first, field)!r} for every job, {spec.name} has {got!r}",
                )
    return first
