"""Reads, checks, lowers and lays out adapters in a bounded pool of threads: no step ever waits for any of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

from peftmux.adapters.base import BaseModel
from peftmux.adapters.lower import load_adapter
from peftmux.adapters.parts import LoweredAdapter
from peftmux.adapters.source import resolve_source
from peftmux.runtime.threads import in_own_thread

Prepared = TypeVar("Prepared")


class Loader(Generic[Prepared]):
    """`root` is the adapter root; `prepare` lays lowered parts out for the device."""

    def __init__(
        self, base: BaseModel, root: str | Path | None, prepare: Callable[[LoweredAdapter], Prepared], workers: int = 2
    ) -> None:
        self._base = base
        self._root = root
        self._prepare = prepare
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="peftmux-loader")
        """Bounds how many load at once; the work itself is done in threads that end."""

    def resolve(self, source: str) -> Path:
        """The folder that `source` names. SourceForbidden or SourceNotFound."""
        return resolve_source(source, self._root)

    def load(self, folder: Path) -> Future[Prepared]:
        """AdapterError in the future where it cannot be served exactly."""
        return self._pool.submit(lambda: in_own_thread(lambda: self._load(folder), "peftmux-load").result())

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, folder: Path) -> Prepared:
        root = self._root if self._root is not None and folder.is_relative_to(Path(self._root).resolve()) else None
        return self._prepare(load_adapter(folder, self._base, root=root))
