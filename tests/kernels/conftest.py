"""Every form of the operators that this machine can run: torch's, and the library at each instruction set."""

from __future__ import annotations

import pytest

from peftmux.kernels import native
from peftmux.kernels.native import library
from peftmux.kernels.native.levels import runnable
from tests.kernels.native_here import skip_without

LEVELS = {level.name: level for level in runnable()}


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
    skip_without(LEVELS[form])
    found = library.open_level(LEVELS[form])
    monkeypatch.setattr(native, "load", lambda: found)
    return "native"
