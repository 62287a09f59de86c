"""`make gpu`: the GPU tests, then the benchmarks, with whatever this interpreter has installed.

Nothing is installed: what it starts finds the four source roots on its path. The parts come in order of importance and
share the budget; what an earlier one leaves, later ones get. Results are written to RESULTS/DEVICE/:
    run.json       device, versions, commit, and of each part its status, seconds and test counts
    summary.md     the same as a table, and each benchmark's own
    NAME.json      the figures of lowrank, engine, attention and bench (`peftmux bench`)

Exit status: 0 nothing failed; 1 a test or a benchmark failed; 2 a package is missing; 3 there is no CUDA device.
With --dry everything runs on the CPU with tiny shapes, GPU tests skip themselves, and no figure means anything.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
ROOTS = ("runtime", "kernels", "trainer", "protos", ".")
FAILED, MISSING, NO_DEVICE = 1, 2, 3
GRACE = 20.0
"""Seconds that a benchmark may take past its own budget: it looks at the clock between scenarios."""

# import name -> distribution
REQUIRED = {
    "torch": "torch",
    "triton": "triton",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "numpy": "numpy",
}
# Needed by `peftmux bench` alone, which goes through gRPC.
SERVING = {
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "google.protobuf": "protobuf",
    "google.rpc": "googleapis-common-protos",
    "prometheus_client": "prometheus-client",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One part of the run. `status`: "passed", "failed", "timed out" or "not run"; `note`: why it is not "passed"."""

    status: str
    seconds: float = 0.0
    counts: dict[str, int] | None = None
    note: str = ""

    @property
    def bad(self) -> bool:
        return self.status in ("failed", "timed out")


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    weight: float
    """Its share of the time that is left when it starts, over the weights of those that come after it."""
    run: Callable[[float], Outcome]
    """Given its seconds."""


def missing(packages: dict[str, str]) -> list[str]:
    """The distributions whose import is not found here."""
    return [name for module, name in packages.items() if not _found(module)]


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def device_name() -> str | None:
    """The first CUDA device's name, or None."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def slug(name: str) -> str:
    """ "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def gpu_test_files(root: Path) -> list[Path]:
    """Test files that use the `gpu` marker. Others are not collected: they may import what is not installed here."""
    return sorted(path for path in root.rglob("test_*.py") if _marks_gpu(path.read_text(encoding="utf-8")))


def _marks_gpu(source: str) -> bool:
    """In its code: a text that names the marker is no use of it."""
    if "mark.gpu" not in source:
        return False
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute) and node.attr == "gpu")
    return any(isinstance(node.value, ast.Attribute) and node.value.attr == "mark" for node in nodes)


def pytest_command(files: Sequence[Path], report: Path) -> list[str]:
    """`addopts` is replaced: --strict-config would refuse the settings of plugins that are not installed here.

    Without pytest the files are run by `plain_tests`, which knows as much of it as they need.
    """
    if not _found("pytest"):
        return [sys.executable, "-m", "benchmarks.plain_tests", f"--junitxml={report}", *map(str, files)]
    options = ["-o", "addopts=", "--import-mode=importlib", "--strict-markers", "-p", "no:cacheprovider", "-q"]
    return [sys.executable, "-m", "pytest", *options, "-m", "gpu", f"--junitxml={report}", *map(str, files)]


def counts(report: Path) -> dict[str, int]:
    """Of a junit file: tests, failures, errors, skipped."""
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    names = ("tests", "failures", "errors", "skipped")
    totals = dict.fromkeys(names, 0)
    for suite in suites:
        for name in names:
            totals[name] += int(suite.get(name, 0))
    return totals


def run(command: Sequence[str], seconds: float) -> Outcome:
    """Run it with its output shown, for at most `seconds`; then it is killed with every process it has started."""
    roots = os.pathsep.join(str(REPOSITORY / root) for root in ROOTS)
    environment = {**os.environ, "PYTHONPATH": roots, "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True)
    try:
        code = process.wait(timeout=max(seconds, 1))
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return Outcome("timed out", time.monotonic() - started, note=f"stopped after {seconds:.0f} s")
    taken = time.monotonic() - started
    return Outcome("passed", taken) if code == 0 else Outcome("failed", taken, note=f"exit status {code}")


def run_tests(folder: Path, dry: bool, seconds: float) -> Outcome:
    """The gpu-marked tests. Unless this is a dry run, a run in which nothing passed is no pass."""
    files = gpu_test_files(REPOSITORY / "tests")
    if not files:
        return Outcome("not run", note="no test is marked gpu")
    report = folder / "junit.xml"
    outcome = run(pytest_command(files, report), seconds)
    if not report.exists():
        return outcome
    found = counts(report)
    report.unlink()
    if outcome.status == "passed" and found["tests"] == found["skipped"] and not dry:
        outcome = replace(outcome, status="failed", note="every test was skipped")
    return replace(outcome, counts=found)


def run_script(name: str, folder: Path, options: argparse.Namespace, seconds: float) -> Outcome:
    """`benchmarks/NAME.py`, which writes NAME.json and NAME.md; an older file never passes for a new one."""
    if not (REPOSITORY / "benchmarks" / f"{name}.py").exists():
        return Outcome("not run", note="not there")
    for suffix in ("json", "md"):
        (folder / f"{name}.{suffix}").unlink(missing_ok=True)
    command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(folder), "--budget", f"{seconds:.0f}"]
    command += ["--dry"] if options.dry else []
    for opponent in options.opponent:
        command += ["--opponent", opponent]
    return _with_figures(run(command, seconds + GRACE), folder / f"{name}.json")


def run_serving(folder: Path, options: argparse.Namespace, seconds: float) -> Outcome:
    """`peftmux bench` on the device, its figures in bench.json."""
    absent = missing(SERVING)
    if absent:
        return Outcome("not run", note=f"not installed: {', '.join(absent)}")
    if options.dry:
        return Outcome("not run", note="it has no dry form")
    figures = folder / "bench.json"
    figures.unlink(missing_ok=True)
    module = "peftmux.cli.main"
    command = [sys.executable, "-m", module, "bench", "--device", "cuda", "--json", str(figures), *options.bench]
    return _with_figures(run(command, seconds), figures)


def _with_figures(outcome: Outcome, figures: Path) -> Outcome:
    if outcome.status == "passed" and not figures.exists():
        return replace(outcome, status="failed", note=f"expected {figures.name}, found none")
    return outcome


def parts(folder: Path, options: argparse.Namespace) -> list[Part]:
    """The most important first."""
    return [
        Part("tests", 9, partial(run_tests, folder, options.dry)),  # most of it compiles; what it leaves goes on
        Part("lowrank", 2, partial(run_script, "lowrank", folder, options)),
        Part("engine", 4, partial(run_script, "engine", folder, options)),
        Part("attention", 1, partial(run_script, "attention", folder, options)),
        Part("serving", 2, partial(run_serving, folder, options)),
    ]


def run_parts(todo: Sequence[Part], budget: float) -> dict[str, Outcome]:
    """Each gets its share of what is left; the last ones nothing where the time has run out."""
    deadline = time.monotonic() + budget
    outcomes: dict[str, Outcome] = {}
    for i, part in enumerate(todo):
        left = deadline - time.monotonic()
        if left < 1:
            outcomes[part.name] = Outcome("not run", note="cut by the budget")
            continue
        share = part.weight / sum(other.weight for other in todo[i:])
        outcomes[part.name] = part.run(left * share)
    return outcomes


def machine(device: str) -> dict[str, str]:
    """What the figures were measured on."""
    found = {"device": device, "python": platform.python_version(), "commit": _commit()}
    for distribution in [*REQUIRED.values(), "peft"]:
        try:
            found[distribution] = version(distribution)
        except PackageNotFoundError:
            found[distribution] = "not installed"
    return found


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        described = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return described.stdout.strip() or "unknown"


def summary(found: dict[str, str], outcomes: dict[str, Outcome], folder: Path) -> str:
    """Markdown: the parts, then the benchmarks' own tables."""
    versions = ", ".join(f"{name} {value}" for name, value in found.items() if name != "device")
    lines = [f"# {found['device']}", "", versions, "", "| part | status | seconds | |", "|---|---|---|---|"]
    for name, outcome in outcomes.items():
        counted = ", ".join(f"{n} {what}" for what, n in (outcome.counts or {}).items())
        note = "; ".join(part for part in (counted, outcome.note) if part)
        lines.append(f"| {name} | {outcome.status} | {outcome.seconds:.1f} | {note} |")
    for name in outcomes:
        own = folder / f"{name}.md"
        if own.exists():
            lines += ["", own.read_text(encoding="utf-8").rstrip()]
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="GPU tests and benchmarks, with what is installed here.")
    parser.add_argument(
        "--results", type=Path, default=REPOSITORY / "benchmarks" / "results", help="folder of DEVICE/*.json"
    )
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="for all parts together")
    parser.add_argument(
        "--opponent",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="another project's kernels to measure beside ours; may be repeated",
    )
    parser.add_argument("--dry", action="store_true", help="the whole flow on the CPU with tiny shapes")
    parser.add_argument("bench", nargs="*", help="after --: more arguments for `peftmux bench`")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    absent = missing(REQUIRED)
    if absent:
        print(f"make gpu: not installed in {sys.executable}: {', '.join(absent)}", file=sys.stderr)
        return MISSING
    device = "dry run" if options.dry else device_name()
    if device is None:
        print("make gpu: torch finds no CUDA device on this machine; nothing was run", file=sys.stderr)
        return NO_DEVICE
    folder = (options.results / slug(device)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = run_parts(parts(folder, options), options.budget)
    found = machine(device)
    result = {**found, **{name: asdict(outcome) for name, outcome in outcomes.items()}}
    (folder / "run.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    text = summary(found, outcomes, folder)
    (folder / "summary.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"results: {folder}")
    return FAILED if any(outcome.bad for outcome in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
