"""Runs GPU tests where pytest is not installed: as much of pytest as they use, under its name.

    python -m benchmarks.plain_tests [--junitxml=FILE] FILES

Of each file the tests with a gpu mark. parametrize, skip and skipif marks, fixtures (plain or generators, of the file
or of a conftest.py in its folder or above; those of a wider scope than a function's last for the file), raises, approx
of numbers and of lists of them, skip, importorskip, param, monkeypatch and tmp_path. Anything else fails the file that
uses it, by name.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import inspect
import itertools
import re
import sys
import tempfile
import traceback
import types
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


class Skipped(Exception):
    """A test that does not run here, and why."""


class Mark:
    """`pytest.mark.NAME`, with or without arguments; adds itself to a test's `pytestmark`."""

    def __init__(self, name: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> None:
        self.name, self.args, self.kwargs = name, args, kwargs or {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and inspect.isfunction(args[0]):
            args[0].__dict__.setdefault("pytestmark", []).insert(0, self)
            return args[0]
        return Mark(self.name, args, kwargs)


class _Marks:
    def __getattr__(self, name: str) -> Mark:
        return Mark(name)


class _Fixture:
    def __init__(self, make: Callable[..., Any], scope: str) -> None:
        self.make, self.scope = make, scope


class _Approx:
    """A number, or some in their order."""

    def __init__(self, value: float | Sequence[float], rel: float = 1e-6, abs: float = 1e-12) -> None:
        self.value, self.rel, self.abs = value, rel, abs

    def __eq__(self, other: object) -> bool:
        if isinstance(self.value, (int, float)):
            return isinstance(other, (int, float)) and self._close(other, self.value)
        if not isinstance(other, (list, tuple)) or len(other) != len(self.value):
            return False
        return all(map(self._close, other, self.value))

    def _close(self, one: float, expected: float) -> bool:
        margin = max(self.rel * (expected if expected > 0 else -expected), self.abs)
        return one == expected or -margin <= one - expected <= margin

    def __repr__(self) -> str:
        return f"about {self.value}"

    __hash__ = None  # type: ignore[assignment]


class MonkeyPatch:
    """`setattr` on objects and `setitem` on mappings, undone at the end of the test."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def setattr(self, target: Any, name: str, value: Any) -> None:
        own = vars(target)
        if name in own:
            self._undo.append(functools.partial(setattr, target, name, own[name]))
        else:
            getattr(target, name)  # AttributeError for a name that is not there
            self._undo.append(functools.partial(delattr, target, name))
        setattr(target, name, value)

    def setitem(self, mapping: Any, key: Any, value: Any) -> None:
        if key in mapping:
            self._undo.append(functools.partial(mapping.__setitem__, key, mapping[key]))
        else:
            self._undo.append(functools.partial(mapping.__delitem__, key))
        mapping[key] = value

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()


@contextlib.contextmanager
def _raises(kind: type[BaseException], match: str | None = None) -> Iterator[types.SimpleNamespace]:
    caught = types.SimpleNamespace(value=None)
    try:
        yield caught
    except kind as error:
        if match is not None and not re.search(match, str(error)):
            raise AssertionError(f"expected {match!r} in {error!s}") from error
        caught.value = error
        return
    raise AssertionError(f"expected {kind.__name__}")


def _fixture(function: Callable[..., Any] | None = None, *, scope: str = "function") -> Any:
    if function is not None:
        return _Fixture(function, scope)
    return lambda wrapped: _Fixture(wrapped, scope)


def _skip(reason: str = "", *, allow_module_level: bool = False) -> None:
    raise Skipped(reason)


def _import_or_skip(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Skipped(str(error)) from error


class _Param(tuple[Any, ...]):
    """The values of one `pytest.param`."""


def _param(*values: Any, id: str | None = None) -> _Param:
    return _Param(values)


def stand_in() -> types.ModuleType:
    """The module that tests import as pytest."""
    module = types.ModuleType("pytest")
    module.__dict__.update(
        mark=_Marks(),
        fixture=_fixture,
        raises=_raises,
        approx=_Approx,
        skip=_skip,
        importorskip=_import_or_skip,
        param=_param,
        MonkeyPatch=MonkeyPatch,
    )
    return module


class File:
    """The tests of one file that are marked gpu."""

    def __init__(self, module: types.ModuleType, path: Path) -> None:
        self._module = module
        self._path = path.resolve()
        self._kept: dict[str, Any] = {}
        self._open = contextlib.ExitStack()

    def tests(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Each with the values of its parametrize marks."""
        shared = getattr(self._module, "pytestmark", [])
        for name, test in vars(self._module).items():
            if name.startswith("test_") and inspect.isfunction(test):
                marks = [*(shared if isinstance(shared, list) else [shared]), *getattr(test, "pytestmark", [])]
                if all(mark.name != "gpu" for mark in marks):
                    continue
                for values in _combinations([mark for mark in marks if mark.name == "parametrize"]):
                    label = f"{name}{list(values.values()) if values else ''}"
                    yield label, lambda test=test, marks=marks, values=values: self._run(test, marks, values)  # type: ignore[misc]

    def close(self) -> None:
        self._open.close()

    def _run(self, test: Callable[..., None], marks: list[Mark], values: dict[str, Any]) -> None:
        for mark in marks:
            if mark.name == "skip" or (mark.name == "skipif" and mark.args[0]):
                raise Skipped(mark.kwargs.get("reason", ""))
        with contextlib.ExitStack() as stack:
            wanted = inspect.signature(test).parameters
            test(**{name: values[name] if name in values else self._value(name, stack, values) for name in wanted})

    def _value(self, name: str, stack: contextlib.ExitStack, values: dict[str, Any]) -> Any:
        if name in self._kept:
            return self._kept[name]
        if name == "tmp_path":
            return Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if name == "monkeypatch":
            patch = MonkeyPatch()
            stack.callback(patch.undo)
            return patch
        found = self._fixture(name)
        lasting = found.scope != "function"
        owner = self._open if lasting else stack
        needed = inspect.signature(found.make).parameters
        made = found.make(**{n: values[n] if n in values else self._value(n, owner, values) for n in needed})
        if inspect.isgenerator(made):
            made = owner.enter_context(contextlib.contextmanager(lambda generator=made: generator)())
        if lasting:
            self._kept[name] = made
        return made

    def _fixture(self, name: str) -> _Fixture:
        """The nearest one: a conftest.py is imported only for what is not found nearer."""
        found = getattr(self._module, name, None)
        for folder in self._path.parents:
            if isinstance(found, _Fixture):
                return found
            if (folder / "conftest.py").exists():
                found = getattr(_conftest(folder / "conftest.py"), name, None)
        raise LookupError(f"expected a fixture {name!r} in the test's own file or a conftest.py above it, got none")


def _combinations(marks: Sequence[Mark]) -> Iterator[dict[str, Any]]:
    """Every choice of values of some parametrize marks."""
    choices = []
    for mark in marks:
        names = mark.args[0]
        split = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
        many = len(split) > 1
        rows = [v if many or isinstance(v, _Param) else (v,) for v in mark.args[1]]
        choices.append([dict(zip(split, row, strict=True)) for row in rows])
    for chosen in itertools.product(*choices):
        yield {name: value for part in chosen for name, value in part.items()}


@functools.cache
def _conftest(path: Path) -> types.ModuleType:
    return load(path, f"plain_{path.parent.name}_conftest")


def load(path: Path, name: str) -> types.ModuleType:
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module
    specification.loader.exec_module(module)
    return module


def run(files: Sequence[Path]) -> Counter[str]:
    """-> how many tests, failures, errors (files that do not load) and skipped ones."""
    totals: Counter[str] = Counter(tests=0, failures=0, errors=0, skipped=0)
    for path in files:
        try:
            file = File(load(path, f"plain_{path.stem}"), path)
        except Skipped as reason:
            print(f"{path}: skipped: {reason}")
            totals.update(tests=1, skipped=1)
            continue
        except Exception:
            traceback.print_exc()
            totals["errors"] += 1
            continue
        for name, test in file.tests():
            _run_one(f"{path.name}::{name}", test, totals)
        file.close()
    return totals


def _run_one(name: str, test: Callable[[], None], totals: Counter[str]) -> None:
    totals["tests"] += 1
    try:
        test()
    except Skipped as reason:
        totals["skipped"] += 1
        print(f"{name}: skipped: {reason}", flush=True)
    except Exception:
        traceback.print_exc()
        totals["failures"] += 1
        print(f"{name}: FAILED", flush=True)
    else:
        print(f"{name}: passed", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--junitxml", type=Path)
    options = parser.parse_args(arguments)
    sys.modules["pytest"] = stand_in()
    totals = run(options.files)
    print(dict(totals))
    if options.junitxml:
        suite = ElementTree.Element("testsuite", {name: str(n) for name, n in totals.items()})
        ElementTree.ElementTree(suite).write(options.junitxml)
    return 1 if totals["failures"] or totals["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
