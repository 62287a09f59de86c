"""The instruction sets we compile for, and which of them this CPU runs."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


@dataclass(frozen=True, slots=True)
class Level:
    """One build of the library. `name` is part of its file name."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str] = frozenset()
    """As Linux names them in /proc/cpuinfo."""


_BF16 = _V4 | {"avx512_bf16"}

X86_LEVELS = (
    Level(
        "x86-64-v4-amx",
        ("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        _BF16 | {"amx_tile", "amx_bf16"},
    ),
    Level("x86-64-v4-bf16", ("-march=x86-64-v4", "-mavx512bf16"), _BF16),
    Level("x86-64-v4", ("-march=x86-64-v4",), _V4),
    Level("x86-64-v3", ("-march=x86-64-v3",), _V3),
)
"""Best first."""


def buildable() -> tuple[Level, ...]:
    """The levels that a compiler of this machine's architecture can build, best first."""
    return X86_LEVELS if _is_x86() else (_native(),)


def runnable() -> tuple[Level, ...]:
    """The levels that this CPU runs, best first; none where it does not say what it has."""
    return tuple(level for level in buildable() if level.needs <= _features())


def best() -> Level | None:
    """The first of `runnable`, if any."""
    return next(iter(runnable()), None)


def has(feature: str) -> bool:
    """Does this CPU say that it has this feature, as Linux names it?"""
    return feature in _features()


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _native() -> Level:
    """What this very CPU has; its features are in the name, so that another machine does not run it."""
    digest = hashlib.sha256(" ".join(sorted(_features())).encode()).hexdigest()[:8]
    return Level(f"{platform.machine()}-{digest}", ("-mcpu=native",))


@cache
def _features() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line.partition(":") for line in text.splitlines())
    return frozenset(next((v.split() for k, _, v in lines if k.strip() in ("flags", "Features")), []))
