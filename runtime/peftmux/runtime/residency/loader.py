"""Reads, checks, lowers and lays out adapters in a bounded pool of threads: no step ever waits for any of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from peftmux.adapters.base import BaseModel
from peftmux.adapters.compose import weighted_sum
from peftmux.adapters.errors import AdapterError, AdapterInvalid, Reason
from peftmux.adapters.lower import load_adapter
from peftmux.adapters.parts import LoweredAdapter
from peftmux.adapters.source import resolve_source
from peftmux.runtime.threads import in_own_thread

Prepared = TypeVar("Prepared")


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter of a weighted sum."""

    name: str
    folder: Path
    digest: str
    weight: float


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

    def load_sum(self, terms: Sequence[Term], digest: str) -> Future[Prepared]:
        """A weighted sum of adapters that are loaded, from their files. AdapterInvalid where these have changed."""
        return self._pool.submit(lambda: in_own_thread(lambda: self._load_sum(terms, digest), "peftmux-sum").result())

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, folder: Path) -> Prepared:
        return self._prepare(self._lower(folder))

    def _lower(self, folder: Path) -> LoweredAdapter:
        root = self._root if self._root is not None and folder.is_relative_to(Path(self._root).resolve()) else None
        return load_adapter(folder, self._base, root=root)

    def _load_sum(self, terms: Sequence[Term], digest: str) -> Prepared:
        lowered = [(self._lower_again(term), term.weight) for term in terms]
        return self._prepare(weighted_sum(lowered, digest))

    def _lower_again(self, term: Term) -> LoweredAdapter:
        again = "load it again (with replace) to use it in a sum, which is made from its files"
        try:
            lowered = self._lower(term.folder)
        except AdapterError as error:
            raise AdapterInvalid(
                Reason.CHANGED_WHILE_LOADING, f"adapter {term.name!r}: {again}; expected them unchanged, got: {error}"
            ) from error
        if lowered.digest != term.digest:
            raise AdapterInvalid(
                Reason.CHANGED_WHILE_LOADING,
                f"adapter {term.name!r}: {again}; expected revision {term.digest}, got {lowered.digest}",
            )
        return lowered
