"""What the native forms need of a machine."""

from __future__ import annotations

import pytest

from peftmux.kernels.native import build, levels

needs_level = pytest.mark.skipif(
    levels.best() is None, reason="needs a CPU that says in /proc/cpuinfo what it has: AVX2 or better on x86"
)


def can_open(level: levels.Level) -> bool:
    """Is its library prebuilt, or a compiler there to make it?"""
    if build.prebuilt_path(level).exists():
        return True
    try:
        build.find_compiler()
    except build.BuildError:
        return False
    return True


def skip_without(level: levels.Level) -> None:
    if not can_open(level):
        pytest.skip(f"needs a C++ compiler, or {level.name} of `python -m peftmux.kernels.native.build`")
