"""Run as a process of its own: the peak memory of a training run above the idle process.

stdin: what `train` is given, as JSON; the last word of stdout: bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import peftmux.trainer.run.loop  # noqa: F401
from peftmux.trainer import train


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


idle = resident("VmRSS")
train(**json.load(sys.stdin))
print("\n", resident("VmHWM") - idle)
