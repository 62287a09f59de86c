"""Every training method with its defaults, on the demo's tasks: accuracy, seconds, peak memory and parameters.

    python -m benchmarks.methods [--bases base small] [--cases NAME ...] [--tasks NAME ...] [--force]

from the repository's root with its source roots on PYTHONPATH. Each run is a process of its own (`methods_run`). Its
record is appended to RESULTS/DEVICE/methods/BASE.jsonl at once, and a run that has one is not run again without
--force: what was interrupted goes on. Prints the tables at the end and writes them to docs/methods.md and methods.svg;
--report does that alone. Accuracies are of one seed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import device_name, slug
from benchmarks.methods_cases import CLASSES, NEW, STEPS, TOLD, Case, cases
from benchmarks.methods_report import Records, write_report
from benchmarks.methods_run import write_record
from peftmux.demo import BASE, SMALL

REPOSITORY = Path(__file__).resolve().parents[1]
BASES = {"base": BASE, "small": SMALL}
LONGEST = 1800.0
"""Seconds that one run may take."""


@dataclass(frozen=True, slots=True)
class Run:
    base: str
    case: Case
    task: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.base, self.case.name, self.task


def device() -> str:
    """The GPU's name, or the processor's with its cores."""
    return device_name() or f"cpu {_processor()} {os.cpu_count()} cores"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def planned(bases: Sequence[str], names: Sequence[str], tasks: Sequence[str]) -> Iterator[Run]:
    """Task by task, so that what is there after an interruption can be compared."""
    for task in tasks:
        for base in bases:
            for case in cases():
                if (not names or case.name in names) and task in case.tasks and case.installed:
                    yield Run(base, case, task)


def read_records(folder: Path) -> Records:
    """By (base, case, task); the newest counts."""
    found: Records = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            found[record["base"], record["case"], record["task"]] = record
    return found


def measured(run: Run) -> dict[str, Any]:
    """The record of a run in a process of its own, forked from one that has imported what all of them need."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["benchmarks.methods_run"])
    named = dict(zip(("base", "case", "task"), run.key, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record.json"
        process = forks.Process(
            target=write_record, args=(BASES[run.base], run.case.name, run.task, STEPS[run.base][run.task], out)
        )
        process.start()
        process.join(LONGEST)
        if process.exitcode is None:
            process.kill()
            process.join()
        if not out.exists():
            return {**named, "failed": f"ended with status {process.exitcode}"}
        return {**named, **json.loads(out.read_text(encoding="utf-8"))}


def append(folder: Path, record: dict[str, Any]) -> None:
    """A record that takes the place of an older one leaves one line."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['base']}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    key = record["case"], record["task"]
    kept = [line for line in lines if (json.loads(line)["case"], json.loads(line)["task"]) != key]
    written = path.with_suffix(".partial")
    written.write_text("".join(f"{line}\n" for line in [*kept, json.dumps(record)]), encoding="utf-8")
    written.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """0: every run has a record; 1: one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__.splitlines()[0])
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--cases", nargs="+", default=[], help="rows of the table; default: all")
    parser.add_argument("--tasks", nargs="+", choices=(TOLD, CLASSES, NEW), default=[TOLD, CLASSES, NEW])
    parser.add_argument("--force", action="store_true", help="run again what has a record")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results", help="folder of DEVICE")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs")
    args = parser.parse_args(argv)
    if unknown := set(args.cases) - {case.name for case in cases()}:
        parser.error(f"expected cases among {', '.join(case.name for case in cases())}; got {', '.join(unknown)}")
    folder = args.results / slug(device()) / "methods"
    records = read_records(folder)
    for run in () if args.report else planned(args.bases, args.cases, args.tasks):
        if run.key in records and "failed" not in records[run.key] and not args.force:
            continue
        record = measured(run)
        print(json.dumps(record), flush=True)
        append(folder, record)
    records = read_records(folder)
    print(write_report(records, device(), args.docs))
    return 1 if any("failed" in record for record in records.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
