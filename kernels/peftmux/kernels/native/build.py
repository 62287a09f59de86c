"""Compile the library. `python -m peftmux.kernels.native.build` puts every level of this architecture beside the
package, for images that run without a compiler."""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from peftmux.kernels.native.levels import Level, buildable

SOURCES = Path(__file__).parent / "src"
PREBUILT = Path(__file__).parent / "lib"

# No -march=native: a library must run wherever its level does. No contraction: products are fused where the source says
# so, so that a row's result does not depend on which unrolled copy of a loop computed it.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-w")


class BuildError(Exception):
    """No compiler, or it failed; the message says which."""


@cache
def source_digest() -> str:
    """Of everything that decides what the compiler makes, the compiler and the level aside."""
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def find_compiler() -> str:
    """CXX, else g++, else c++."""
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else ("g++", "c++"):
        if found := shutil.which(name):
            return found
    raise BuildError(f"no C++ compiler: {wanted} not found" if wanted else "no C++ compiler: neither g++ nor c++ found")


def compiler_version(compiler: str) -> str:
    """The compiler's own first line."""
    return _run([compiler, "--version"]).splitlines()[0]


def compile_library(compiler: str, level: Level, target: Path) -> None:
    """Write the library of this level to `target`, at once or not at all. Raises BuildError, or OSError where the
    folder cannot be written."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        made = Path(folder) / target.name
        units = [str(p) for p in sorted(SOURCES.glob("*.cpp"))]
        objects = [Path(folder) / f"{i}.o" for i in range(len(units))]
        for unit, made_object in zip(units, objects, strict=True):
            _run([compiler, *_FLAGS, *level.flags, "-c", unit, "-o", str(made_object)])
        # Linked without -fopenmp: its symbols resolve to the OpenMP library that torch has loaded, so that both share
        # one pool of threads.
        _run([compiler, "-shared", *map(str, objects), "-o", str(made)])
        os.replace(made, target)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise BuildError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def prebuilt_path(level: Level) -> Path:
    return PREBUILT / f"peftmux-{source_digest()}-{level.name}.so"


def main() -> None:
    argparse.ArgumentParser(prog="python -m peftmux.kernels.native.build", description=__doc__).parse_args()
    compiler = find_compiler()
    PREBUILT.mkdir(exist_ok=True)
    print(f"{compiler}: {compiler_version(compiler)}")
    for level in buildable():
        try:
            compile_library(compiler, level, prebuilt_path(level))
            print(prebuilt_path(level))
        except BuildError as error:  # an older compiler may not know every level, but knows the last
            if level is buildable()[-1]:
                raise
            print(f"without {level.name}: {error}")


if __name__ == "__main__":
    main()
