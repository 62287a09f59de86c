"""Every form of the operators that this machine can run: torch's, and the library at each instruction set."""

from __future__ import annotations

import shutil

import pytest

from peftmux.kernels import native
from peftmux.kernels.native import library
from peftmux.kernels.native.levels import best, buildable

_BEST = best()
LEVELS = {level.name: level for level in buildable() if _BEST and level.needs <= _BEST.needs}


@pytest.fixture(params=["torch", *LEVELS])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make this form the one that the operators choose; -> "torch" or "native"."""
    return _choose(request.param, monkeypatch)


@pytest.fixture(params=list(LEVELS))
def native_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As `path`, for what only the native form promises: a row's bits do not depend on the batch around it. (torch's
    products choose their order of summation by shape.)"""
    return _choose(request.param, monkeypatch)


def _choose(form: str, monkeypatch: pytest.MonkeyPatch) -> str:
    if form == "torch":
        monkeypatch.setattr(native, "load", lambda: None)
        return "torch"
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler here")
    found = library.open_level(LEVELS[form])
    monkeypatch.setattr(native, "load", lambda: found)
    return "native"
