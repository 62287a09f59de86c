"""The process's memory as the system counts it (Linux; elsewhere nothing is known), and how much it may still take.

More than its tensors: a C library's heap keeps holes between them (glibc's 20 to 50 % of what a step allocates, growing
over the first steps), kernels have workspaces, and the first step brings code in. On the other hand weights as they are
in a file count only where they were read: of an embedding table the rows that were looked up.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

_GROUP = Path("/sys/fs/cgroup")


def resident(field: str = "VmRSS") -> int | None:
    """Bytes: "VmRSS" now, "VmHWM" at the highest since the process began."""
    return _kilobytes(Path("/proc/self/status"), field)


def available(device: torch.device) -> int:
    """Bytes that a run may still take, of the machine and of the container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    if free is None:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, StopIteration):  # no container, or one without a limit
        limit = int((_GROUP / "memory.max").read_text())
        lines = (_GROUP / "memory.stat").read_text().splitlines()
        free = min(free, limit - next(int(line.split()[1]) for line in lines if line.startswith("anon ")))
    return free


def _kilobytes(path: Path, field: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
