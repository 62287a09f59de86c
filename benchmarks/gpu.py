"""`make gpu`: what of the tests and the benchmark a CUDA device can run, with whatever this interpreter has installed.

Nothing is installed: what it starts finds the four source roots on its path. Results are JSON under RESULTS/DEVICE/:
    run.json     device, versions, commit, test counts, seconds, exit codes
    bench.json   the benchmark's own figures (`peftmux bench --json`)

Exit status: 0 everything passed; 1 a test or the benchmark failed; 2 a package is missing; 3 there is no CUDA device.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
ROOTS = ("runtime", "kernels", "trainer", "protos")
FAILED, MISSING, NO_DEVICE = 1, 2, 3

# import name -> distribution
REQUIRED = {
    "torch": "torch",
    "triton": "triton",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "numpy": "numpy",
    "grpc": "grpcio",
    "google.protobuf": "protobuf",
    "prometheus_client": "prometheus-client",
}
# Without pytest and its plugins there are no tests, and that is said.
TESTING = {"pytest": "pytest", "pytest_timeout": "pytest-timeout"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One part of the run. `status`: "passed", "failed", "timed out" or "not run"; `note`: why it is not "passed"."""

    status: str
    seconds: float = 0.0
    counts: dict[str, int] | None = None
    note: str = ""


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
    """Test files that name the `gpu` marker. Others are not collected: they may import what is not installed here."""
    return sorted(path for path in root.rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8"))


def pytest_command(files: Sequence[Path], report: Path) -> list[str]:
    """`addopts` is replaced: --strict-config would refuse the settings of plugins that are not installed here."""
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


def run_tests(folder: Path, seconds: float) -> Outcome:
    """The gpu-marked tests. A run in which nothing passed is no pass."""
    absent = missing(TESTING)
    if absent:
        return Outcome("not run", note=f"not installed: {', '.join(absent)}")
    files = gpu_test_files(REPOSITORY / "tests")
    if not files:
        return Outcome("not run", note="no test is marked gpu")
    report = folder / "junit.xml"
    outcome = run(pytest_command(files, report), seconds)
    if not report.exists():
        return outcome
    found = counts(report)
    report.unlink()
    if outcome.status == "passed" and found["tests"] == found["skipped"]:
        outcome = Outcome("failed", outcome.seconds, note="every test was skipped")
    return Outcome(outcome.status, outcome.seconds, found, outcome.note)


def run_benchmark(folder: Path, seconds: float, extra: Sequence[str]) -> Outcome:
    """`peftmux bench` on the device, its figures in bench.json; an older file never passes for a new one."""
    figures = folder / "bench.json"
    figures.unlink(missing_ok=True)
    command = [sys.executable, "-m", "peftmux.cli.main", "bench", "--device", "cuda", "--json", str(figures), *extra]
    outcome = run(command, seconds)
    if outcome.status == "passed" and not figures.exists():
        return Outcome("failed", outcome.seconds, note=f"expected {figures.name}, found none")
    return outcome


def machine(device: str) -> dict[str, str]:
    """What the figures were measured on."""
    found = {"device": device, "python": platform.python_version(), "commit": _commit()}
    for distribution in [*REQUIRED.values(), "peft"]:
        try:
            found[distribution] = version(distribution)
        except PackageNotFoundError:
            found[distribution] = "unknown"
    return found


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        described = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return described.stdout.strip() or "unknown"


def table(device: str, outcomes: dict[str, Outcome]) -> str:
    lines = [f"{device}"]
    for name, outcome in outcomes.items():
        counted = ", ".join(f"{n} {what}" for what, n in (outcome.counts or {}).items())
        note = "; ".join(part for part in (counted, outcome.note) if part)
        lines.append(f"  {name:<10} {outcome.status:<10} {outcome.seconds:7.1f} s  {note}".rstrip())
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="GPU tests and benchmark, with what is installed here.")
    parser.add_argument(
        "--results", type=Path, default=REPOSITORY / "benchmarks" / "results", help="folder of DEVICE/*.json"
    )
    parser.add_argument("--seconds", type=float, default=570.0, help="for tests and benchmark together")
    parser.add_argument("bench", nargs="*", help="after --: more arguments for `peftmux bench`")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    absent = missing(REQUIRED)
    if absent:
        print(f"make gpu: not installed in {sys.executable}: {', '.join(absent)}", file=sys.stderr)
        return MISSING
    device = device_name()
    if device is None:
        print("make gpu: torch finds no CUDA device on this machine; nothing was run", file=sys.stderr)
        return NO_DEVICE
    folder = (options.results / slug(device)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.seconds
    # Half of the time at most, so that slow tests still leave a benchmark.
    outcomes = {"tests": run_tests(folder, options.seconds / 2)}
    outcomes["benchmark"] = run_benchmark(folder, deadline - time.monotonic(), options.bench)
    result = {**machine(device), **{name: asdict(outcome) for name, outcome in outcomes.items()}}
    (folder / "run.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(device, outcomes))
    print(f"results: {folder}")
    if outcomes["tests"].status == "not run":
        return MISSING
    return 0 if all(outcome.status == "passed" for outcome in outcomes.values()) else FAILED


if __name__ == "__main__":
    sys.exit(main())
