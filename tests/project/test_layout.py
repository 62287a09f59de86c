"""The namespace has no owner, and every module of it imports."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ROOTS = ("runtime", "kernels", "trainer", "protos")


def modules() -> list[str]:
    """Dotted names of all modules in the four roots."""
    names = set()
    for root in ROOTS:
        for path in (REPOSITORY / root).rglob("*.py"):
            parts = path.relative_to(REPOSITORY / root).with_suffix("").parts
            names.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return sorted(names)


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


@pytest.mark.parametrize("name", modules())
def test_module_imports(name):
    importlib.import_module(name)


@pytest.mark.parametrize("root", ROOTS)
def test_every_package_is_marked_as_typed(root):
    packages = [path for path in (REPOSITORY / root / "peftmux").iterdir() if any(path.glob("*.py"))]
    assert packages
    assert [path.name for path in packages if not (path / "py.typed").exists()] == []


def test_test_files_have_unique_names():
    """Reports name a test by its file: two of the same name could not be told apart."""
    names = [path.name for path in (REPOSITORY / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
