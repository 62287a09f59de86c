"""Run as a process of its own: peak memory of training runs above the idle process, and what was estimated for each.

argv: a base's folder, a file of rows, a folder to write to; stdin: a JSON list of {"method", "training", ...}; the
last line of stdout: a list of {"measured", "estimated"} in bytes. Every number is of a fork of this process, which
has imported everything and computed nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peftmux.trainer.loop  # noqa: F401
from peftmux.trainer import train


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def forked(work: Callable[[], float]) -> float:
    """The number that `work` gives in a process of its own, which is silent unless it fails."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        errors, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1), os.dup2(nothing, 2)
        try:
            os.write(writer, str(work()).encode())
        except BaseException as error:
            os.write(errors, f"{type(error).__name__}: {error}\n".encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        result = stream.read()
    os.waitpid(child, 0)
    return float(result)


def main() -> None:
    base, rows, out = sys.argv[1:4]
    runs: list[dict[str, Any]] = json.load(sys.stdin)
    results = []
    for run in runs:
        training = {"disable_tqdm": True, "logging_strategy": "no", **run.pop("training")}
        options: dict[str, Any] = {"model": base, "data": rows, "out": out, "overwrite": True, "training": training}
        options |= run
        method = options.pop("method")

        def estimate(method: str = method, options: dict[str, Any] = options) -> float:
            return train(method, **options, dry_run=True).metrics["peak_bytes"]

        def measure(method: str = method, options: dict[str, Any] = options) -> float:
            idle = resident("VmRSS")
            train(method, **options)
            return resident("VmHWM") - idle

        results.append({"measured": forked(measure), "estimated": forked(estimate)})
    print(f"\n{json.dumps(results)}")


main()
