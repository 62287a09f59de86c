"""`peftmux train METHOD ...`: flags > environment PEFTMUX_* > the file of --config > defaults."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from peftmux.adapters.errors import AdapterError
from peftmux.trainer.errors import TrainerError
from peftmux.trainer.settings.config_file import file_arguments, flags


def main(argv: Sequence[str]) -> int:
    """The exit status: 0, 1 for a refused run, 2 for bad usage, 130 after Ctrl-C, 143 after SIGTERM.

    `argv` follows `train`.
    """
    from peftmux.trainer.methods import ALIASES, METHODS

    one = bool(argv) and argv[0] in (*METHODS, *ALIASES)
    jobs = not one and any(word.partition("=")[0] == "--jobs" for word in argv)
    if not one and not jobs:
        return _overview(argv)
    try:
        with _terminable():
            return _run_jobs(argv) if jobs else _run(argv[0], argv[1:])
    except SystemExit as stop:  # argparse has printed its message
        return int(stop.code or 0)
    except _Terminated:
        print("peftmux train: terminated: nothing more is written", file=sys.stderr)
        return 128 + signal.SIGTERM
    except (TrainerError, AdapterError) as error:
        print(f"peftmux train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("peftmux train: interrupted: nothing more is written", file=sys.stderr)
        return 128 + signal.SIGINT


class _Terminated(BaseException):
    pass


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds the run as Ctrl-C does, so that what it has begun to write beside the adapter goes with it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _overview(argv: Sequence[str]) -> int:
    from peftmux.trainer.methods import ALIASES, METHODS

    asked = bool(argv) and argv[0] in ("-h", "--help")
    lines = ["usage: peftmux train METHOD --model M --data D.jsonl --out DIR [options]"]
    lines += ["       peftmux train --jobs FILE.yaml [--watch] [--resume]", "", "methods:"]
    lines += [f"  {m.name:<12} {m.summary}" for m in METHODS.values()]
    for name, (method, options) in ALIASES.items():
        words = [word for option, value in options.items() for word in (f"--{option}", value)]
        lines.append(f"  {name:<12} stands for: {' '.join([method, *words])}")
    lines += ["", "peftmux train METHOD --help lists a method's options."]
    if argv and not asked:
        lines.append(f"\npeftmux train: METHOD: expected one of {', '.join([*METHODS, *ALIASES])}; got {argv[0]!r}")
    print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def _run(name: str, argv: Sequence[str]) -> int:
    from peftmux.trainer.jobs.ensemble import run_ensemble
    from peftmux.trainer.jobs.file import split_options
    from peftmux.trainer.jobs.sweep import run_sweep
    from peftmux.trainer.methods import get_method, unaliased
    from peftmux.trainer.run.loop import run_training
    from peftmux.trainer.settings.parser import build_parser

    method, aliased = unaliased(name, {})
    parser = build_parser(method)
    words = [*flags(parser, aliased, name), *file_arguments(parser, argv, os.environ), *argv]
    given = vars(parser.parse_args(words))
    given.pop("config", None)
    spec = split_options(method, get_method(method), given)
    if spec.options.ensemble:
        print(run_ensemble(spec, given).table())
        return 0
    if spec.options.sweep:
        print(run_sweep(spec, given).table())
        return 0
    result = run_training(spec.method, spec.options, spec.config, spec.training)
    if result.digest:
        print(f"{name} adapter after {result.steps} steps: {result.out}")
    return 0


def _run_jobs(argv: Sequence[str]) -> int:
    from peftmux.trainer.jobs.file import Changes, JobsFile, resumed
    from peftmux.trainer.jobs.run import JobRun

    parser = argparse.ArgumentParser(
        prog="peftmux train",
        description="Train many adapters on one base at once, each as in a run of its own: with the same data, draws "
        "and schedule, up to float32's rounding (about 1e-5 in the tensors after tens of steps; up to 1e-3 for "
        "mixtures and pissa, which amplify it; more after hundreds). A base that has dropout of its own gives each "
        "job its own passes, which gains no time.",
    )
    parser.add_argument("--jobs", metavar="FILE", required=True, help="YAML: defaults, and a list of jobs")
    parser.add_argument(
        "--watch", action="store_true", help="jobs added to the file meanwhile join, removed ones leave"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="leave out what is done, go on from checkpoints: the "
        "bits of the whole run where the jobs' checkpoints are of one round",
    )
    args = parser.parse_args(argv)
    file = JobsFile(args.jobs)
    specs = resumed(file.read()) if args.resume else file.read()

    def changes() -> Changes:
        found = file.changes()
        return replace(found, joined=resumed(found.joined)) if args.resume else found

    run = JobRun(specs, changes if args.watch else Changes)
    for name, result in run.run().items():
        print(f"{name}: {result.steps} steps, loss {result.metrics['train_loss']:.4g}: {result.out}")
    for name, message in run.failed.items():
        print(f"peftmux train: {name}: {message}", file=sys.stderr)
    return 1 if run.failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
