"""Where the library comes from, what happens without one, and that it shares torch's threads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peftmux.kernels import native
from peftmux.kernels.native import build, levels, library
from tests.kernels.native_here import needs_level, skip_without

_SAY = """
import torch
from peftmux.kernels import native
from peftmux.kernels.attention import choose_attention
from peftmux.kernels.lowrank import LowRankSite
print(choose_attention("cpu", torch.bfloat16).name, LowRankSite(8, [8], torch.float32).path, native.status(), sep="|")
"""

_NOTHING_PREBUILT = """
from pathlib import Path
from peftmux.kernels.native import build
build.PREBUILT = Path("/nonexistent")
"""


def say(*, prebuilt: bool = True, **environment: str) -> list[str]:
    """-> [attention path, low-rank path, status] of a fresh process. prebuilt: it may see what `build` left here."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PEFTMUX_") and k != "CXX"}
    program = _SAY if prebuilt else _NOTHING_PREBUILT + _SAY
    done = subprocess.run(
        [sys.executable, "-c", program], env=kept | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip().split("|")


@needs_level
def test_the_native_path_runs_where_it_can() -> None:
    level = levels.best()
    assert level is not None
    skip_without(level)
    attention, lowrank, status = say()
    assert (attention, lowrank) == ("native", "native")
    assert status.startswith(f"native {level.name} (")


def test_it_can_be_turned_off() -> None:
    assert say(PEFTMUX_NATIVE="0") == ["torch", "torch", "torch only: PEFTMUX_NATIVE=0"]


@needs_level
def test_without_a_compiler_torch_runs(tmp_path: Path) -> None:
    attention, lowrank, status = say(prebuilt=False, PEFTMUX_CACHE_DIR=str(tmp_path), CXX="no-such-compiler")
    assert (attention, lowrank) == ("torch", "torch")
    assert status == "torch only: no C++ compiler: no-such-compiler not found"


@needs_level
def test_a_failing_compiler_is_named(tmp_path: Path) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo broken 1 && exit 0\necho it broke >&2\nexit 1\n')
    compiler.chmod(0o755)
    attention, _, status = say(prebuilt=False, PEFTMUX_CACHE_DIR=str(tmp_path / "cache"), CXX=str(compiler))
    assert attention == "torch"
    assert status == f"torch only: {compiler} failed: it broke"
    assert not list((tmp_path / "cache").rglob("*.so"))


@needs_level
def test_a_cache_that_others_can_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    level = levels.best()
    assert level is not None
    monkeypatch.setenv("PEFTMUX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "none")
    monkeypatch.setattr(library, "find_compiler", lambda: "compiler")
    monkeypatch.setattr(library, "compiler_version", lambda compiler: "1")
    monkeypatch.setattr(library, "compile_library", lambda compiler, level, target: _touch(target))
    target = library.find_or_compile(level)
    assert target.is_relative_to(tmp_path)
    target.chmod(0o666)
    with pytest.raises(build.BuildError, match="can be written by other users"):
        library.find_or_compile(level)


def _touch(target: Path) -> None:
    target.touch(mode=0o600)


def test_the_build_command_leaves_every_level_beside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "lib")
    monkeypatch.setattr(build, "find_compiler", lambda: "compiler")
    monkeypatch.setattr(build, "compiler_version", lambda compiler: "1")
    monkeypatch.setattr(build, "compile_library", lambda compiler, level, target: target.touch())
    monkeypatch.setattr(sys, "argv", ["build"])
    build.main()
    made = {build.prebuilt_path(level) for level in levels.buildable()}
    assert set((tmp_path / "lib").iterdir()) == made


@needs_level
def test_prebuilt_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    level = levels.best()
    assert level is not None
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    build.prebuilt_path(level).touch()
    assert library.find_or_compile(level) == build.prebuilt_path(level)


def test_the_digest_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(build.SOURCES, tmp_path / "src")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "src")
    digest = build.source_digest.__wrapped__
    assert digest() == build.source_digest()
    (tmp_path / "src" / "vec.h").write_text("// changed\n")
    assert digest() != build.source_digest()


def test_levels_follow_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    v3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
    v4 = v3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
    monkeypatch.setattr(levels, "_is_x86", lambda: True)
    for features, expected in (
        (v4 | {"avx512_bf16", "amx_tile", "amx_bf16"}, "x86-64-v4-amx"),
        (v4 | {"avx512_bf16", "amx_tile"}, "x86-64-v4-bf16"),
        (v4, "x86-64-v4"),
        (v4 - {"avx512vl"}, "x86-64-v3"),
        (v3 - {"fma"}, None),
        (set(), None),
    ):
        monkeypatch.setattr(levels, "_features", lambda found=frozenset(features): found)
        level = levels.best()
        assert (level and level.name) == expected


def test_one_openmp_library_serves_torch_and_us() -> None:
    if native.load() is None:
        pytest.skip(f"needs the native library, which a C++ compiler makes; here {native.status()}")
    torch.randn(64, 64) @ torch.randn(64, 64)
    mapped = {Path(line.split()[-1]).name for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    runtimes = {name for name in mapped if re.match(r"lib(g|i)?omp(5|-[0-9a-f]+)?\.so", name)}  # GNU's, Intel's, LLVM's
    assert len(runtimes) == 1, runtimes
