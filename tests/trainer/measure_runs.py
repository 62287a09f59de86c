"""Run as a process of its own: peak memory of training runs above the idle process, and what was estimated for each.

argv: a base's folder, a file of rows, a folder to write to; stdin: a JSON list of {"method", "training"}; the last line
of stdout: a list of {"measured", "estimated"} in bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from peftmux.trainer import train


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    base, rows, out = sys.argv[1:4]
    results = []
    runs: list[dict[str, Any]] = json.load(sys.stdin)
    for number, run in enumerate([runs[0], *runs]):
        options: dict[str, Any] = {"model": base, "data": rows, "overwrite": True, "config": run.get("config")}
        options["training"] = {"max_steps": 2, "disable_tqdm": True, **run["training"]}
        with contextlib.redirect_stderr(open(os.devnull, "w")):
            estimate = train(run["method"], **options, out=out, dry_run=True).metrics["peak_bytes"]
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # or small tensors come to stand in holes that the idle process has
            idle = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            train(run["method"], **options, out=out)
            gc.collect()
        if number:  # the first has brought in what Python and torch load when they first train
            results.append({"measured": resident("VmHWM") - idle, "estimated": estimate})
    print(f"\n{json.dumps(results)}")


main()
