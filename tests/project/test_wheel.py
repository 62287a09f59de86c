"""The wheel: built here, it holds every module and data file of the four roots and imports from nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ROOTS = ("runtime", "kernels", "trainer", "protos")
# What stays in the repository alone: caches and libraries that a machine has built for itself.
LEFT_OUT = {".pyc", ".so", ".o"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the tracked and new files, so that a test run leaves nothing behind."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for root in ROOTS:
        shutil.copytree(REPOSITORY / root, source / root, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.o"))
    for name in ("pyproject.toml", "README.md", ".gitignore"):
        shutil.copy(REPOSITORY / name, source / name)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(built)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    (only,) = built.glob("*.whl")
    return only


def test_wheel_holds_every_file_of_the_roots(wheel):
    expected = {
        str(path.relative_to(REPOSITORY / root))
        for root in ROOTS
        for path in (REPOSITORY / root / "peftmux").rglob("*")
        if path.is_file() and path.suffix not in LEFT_OUT
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert names == expected


@pytest.mark.parametrize("kind", [".py", ".pyi", ".proto", "/py.typed"])
def test_wheel_holds_each_kind_of_file(wheel, kind):
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.endswith(kind)]


def test_wheel_imports_without_the_repository(wheel, tmp_path):
    """All four roots come from the wheel, whatever this environment has installed."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    editable = [str(REPOSITORY / root) for root in ROOTS]
    names = ["peftmux.runtime", "peftmux.adapters", "peftmux.kernels", "peftmux.trainer", "peftmux.v1.inference_pb2"]
    program = (
        f"import importlib, sys; sys.path = [p for p in sys.path if p not in {editable!r}]\n"
        f"for name in {names!r}: print(importlib.import_module(name).__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    files = [Path(line) for line in done.stdout.splitlines()]
    assert len(files) == len(names)
    assert all(file.is_relative_to(tmp_path) for file in files), files


def test_command_is_an_entry_point(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        text = archive.read(entry).decode()
    assert "peftmux = peftmux.cli.main:main" in text
