"""Find, compile and bind the library."""

from __future__ import annotations

import ctypes
import hashlib
import os
import stat
from collections.abc import Callable
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from peftmux.kernels.native.build import (
    BuildError,
    compile_library,
    compiler_version,
    find_compiler,
    prebuilt_path,
    source_digest,
)
from peftmux.kernels.native.levels import Level, runnable

Function = Callable[..., None]

_ATTENTION = (
    *(c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64),
    *(c_int32, c_int32, c_int32, c_int32, c_int32, c_int32, c_int32, c_float, c_float, c_int32, c_int32),
    c_int32,
)
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "peftmux_attention": _ATTENTION,
    "peftmux_store_kv": (
        *(c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_void_p),
        *(c_int32, c_int32, c_int32),
    ),
    "peftmux_rms_norm": (c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int32, c_float, c_int32),
    "peftmux_swiglu": (c_void_p, c_int64, c_void_p, c_int64, c_int32, c_int32),
    "peftmux_rotate": (
        *(c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_int64),
        *(c_int32, c_int32, c_int32),
    ),
    "peftmux_lowrank": (c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int32, c_int32),
}
"""As the extern "C" functions of src/; each exists with the suffixes of _SUFFIXES."""

_DENSE = (c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int32, c_int32, c_int32, c_int32)

_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Library:
    """The loaded library. Its functions release the GIL and take addresses: who calls them checks tensors."""

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))
        self._functions = {
            (name, dtype): _bind(loaded, f"{name}_{suffix}", types)
            for name, types in _SIGNATURES.items()
            for dtype, suffix in _SUFFIXES.items()
        }
        self._dense = _bind_dense(loaded)

    def function(self, name: str, dtype: torch.dtype) -> Function:
        """The function for this element type; `supports` says whether there is one."""
        return self._functions[name, dtype]

    def dense(self, dtype: torch.dtype) -> Function | None:
        """peftmux_dense_bf16, where there is one at this level and the system lets this process use it."""
        return self._dense if dtype is torch.bfloat16 else None

    @staticmethod
    def supports(device: torch.device | str, dtype: torch.dtype) -> bool:
        return torch.device(device).type == "cpu" and dtype in _SUFFIXES


def _bind(loaded: ctypes.CDLL, name: str, types: tuple[type, ...]) -> Function:
    function = loaded[name]
    function.argtypes = types
    function.restype = None
    return function


def _bind_dense(loaded: ctypes.CDLL) -> Function | None:
    ready = getattr(loaded, "peftmux_dense_ready", None)
    return _bind(loaded, "peftmux_dense_bf16", _DENSE) if ready is not None and ready() else None


@dataclass(frozen=True, slots=True)
class Status:
    """What `load` came to."""

    library: Library | None
    level: str
    path: str
    reason: str
    """Why there is no library; "" where there is one."""

    def __str__(self) -> str:
        return f"native {self.level} ({self.path})" if self.library else f"torch only: {self.reason}"


def load() -> Library | None:
    """The library, or None: then the torch paths run. The first call may compile, which takes some seconds."""
    return status().library


@cache
def status() -> Status:
    """Load once a process, and say how it went."""
    if os.environ.get("PEFTMUX_NATIVE", "1") == "0":
        return Status(None, "", "", "PEFTMUX_NATIVE=0")
    failed: Status | None = None
    for level in runnable():  # an older compiler may not know the best one
        status = _open(level)
        if status.library:
            return status
        failed = failed or status
    return failed or Status(None, "", "", "this CPU has none of the supported instruction sets (AVX2 or better)")


def _open(level: Level) -> Status:
    try:
        path = find_or_compile(level)
        return Status(Library(path), level.name, str(path), "")
    except (BuildError, OSError, AttributeError) as error:
        return Status(None, level.name, "", str(error))


def open_level(level: Level) -> Library:
    """The library of one level, which this CPU must be able to run. Raises BuildError or OSError."""
    return Library(find_or_compile(level))


def find_or_compile(level: Level) -> Path:
    """Beside the package, else in the user's cache, else compiled there."""
    if (ready := prebuilt_path(level)).exists():
        return ready
    compiler = find_compiler()
    key = hashlib.sha256(compiler_version(compiler).encode()).hexdigest()[:8]
    path = cache_folder() / f"peftmux-{source_digest()}-{key}-{level.name}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        compile_library(compiler, level, path)
    _refuse_foreign(path)
    return path


def cache_folder() -> Path:
    """PEFTMUX_CACHE_DIR, else the user's cache folder of the XDG base directory specification."""
    if own := os.environ.get("PEFTMUX_CACHE_DIR"):
        return Path(own) / "native"
    try:
        shared = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    except RuntimeError as error:
        raise BuildError(f"no cache folder: {error}; set PEFTMUX_CACHE_DIR") from error
    return Path(shared) / "peftmux" / "native"


def _refuse_foreign(path: Path) -> None:
    """Code is only loaded from files that nobody but this user (or root) can have written."""
    for place in (path.parent, path):
        found = place.stat()
        if found.st_uid not in (os.getuid(), 0) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise BuildError(f"{place} can be written by other users")
