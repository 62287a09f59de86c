"""The namespace has no owner, and every module of it imports."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ROOTS = ("runtime", "kernels", "trainer", "protos")


def modules() -> dict[str, Path]:
    """All modules in the four roots: dotted name -> file, from its root."""
    found = {}
    for root in ROOTS:
        for path in sorted((REPOSITORY / root).rglob("*.py")):
            file = path.relative_to(REPOSITORY / root)
            parts = file.with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@pytest.mark.parametrize("root", ROOTS)
def test_namespace_has_no_init(root):
    """One __init__.py here would hide the other three roots."""
    namespace = REPOSITORY / root / "peftmux"
    assert namespace.is_dir()
    assert not (namespace / "__init__.py").exists()


def test_roots_hold_one_package_each():
    """In an editable install every folder of a root is importable from the top."""
    for root in ROOTS:
        folders = {path.name for path in (REPOSITORY / root).iterdir() if path.is_dir() and any(path.rglob("*.py"))}
        assert folders == {"peftmux"}


def test_no_module_is_defined_twice():
    seen: dict[str, str] = {}
    for root in ROOTS:
        for path in (REPOSITORY / root).rglob("*.py"):
            name = str(path.relative_to(REPOSITORY / root))
            assert name not in seen, f"{name} is in {seen.get(name)} and in {root}"
            seen[name] = root


@pytest.mark.parametrize(("name", "file"), modules().items(), ids=str)
def test_module_imports(name, file):
    """From that file, in a checkout or where it is installed."""
    imported = importlib.import_module(name).__file__
    assert imported is not None
    assert Path(imported).parts[-len(file.parts) :] == file.parts


@pytest.mark.parametrize("root", ROOTS)
def test_every_package_is_marked_as_typed(root):
    packages = [path for path in (REPOSITORY / root / "peftmux").iterdir() if any(path.glob("*.py"))]
    assert packages
    assert [path.name for path in packages if not (path / "py.typed").exists()] == []


def test_test_files_have_unique_names():
    """Reports name a test by its file: two of the same name could not be told apart."""
    names = [path.name for path in (REPOSITORY / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
