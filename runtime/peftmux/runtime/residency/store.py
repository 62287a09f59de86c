"""The adapters by name: states, revisions and leases.

A revision is owned by its entry until a new one replaces it or the name is unloaded. From then on it is retired, and
the last request that leaves it triggers its removal from the device. Every method may be called from any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Generic, TypeVar

from peftmux.runtime.errors import AdapterLoading, AdapterNotFound, Draining

Placement = TypeVar("Placement")
_MIN_REVISION = 8
"""Characters of a digest that name@revision must give at least."""


class State(Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Revision(Generic[Placement]):
    """One adapter's content on the device, or a weighted sum of several.

    `users` and `retired` are guarded by the store's lock.
    """

    name: str
    digest: str
    kind: str
    ranks: tuple[int, int]
    applied_sites: int
    tensors: int
    parameters: int
    bytes: int
    placement: Placement
    folder: Path | None = None
    """Where its files were read."""
    members: tuple[Revision[Placement], ...] = ()
    """Of a weighted sum: who leases it leases them too."""
    users: int = 0
    retired: bool = False


@dataclass(slots=True)
class Entry(Generic[Placement]):
    """One name. `revision` is what new requests get; None until the first load has succeeded."""

    name: str
    state: State
    source: str
    revision: Revision[Placement] | None = None
    pinned: bool = False
    weight: float = 1.0
    error: str = ""
    load_seconds: float = 0.0
    removed: Future[None] = field(default_factory=lambda: _uncancellable())
    """Done when an unloaded adapter's memory is free."""


def _uncancellable() -> Future[None]:
    """Whoever stops waiting for it must not stop it for the others."""
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    return future


class AdapterStore(Generic[Placement]):
    """`remove` is called with a retired revision when its last user has gone; it frees the device's memory.

    `changed` is called with an entry after each change of it, and whether its name is free again.
    """

    def __init__(
        self, remove: Callable[[Revision[Placement]], None], changed: Callable[[Entry[Placement], bool], None]
    ) -> None:
        self._remove = remove
        self._changed = changed
        self._lock = threading.Lock()
        self._entries: dict[str, Entry[Placement]] = {}

    def get(self, name: str) -> Entry[Placement]:
        """AdapterNotFound for a name that is not there."""
        with self._lock:
            return self._entry(name)

    def find(self, name: str) -> Entry[Placement] | None:
        with self._lock:
            return self._entries.get(name)

    def entries(self) -> list[Entry[Placement]]:
        with self._lock:
            return sorted(self._entries.values(), key=lambda e: e.name)

    def acquire(self, adapter: str) -> Revision[Placement]:
        """Lease the revision that "name" or "name@revision" means now; `release` it once."""
        name, _, wanted = adapter.partition("@")
        with self._lock:
            entry = self._entry(name)
            revision = entry.revision
            if entry.state is State.DRAINING:
                raise Draining(f"adapter {name!r} is being unloaded")
            if revision is None:
                if entry.state is State.FAILED:
                    raise AdapterNotFound(f"adapter {name!r} failed to load: {entry.error}")
                raise AdapterLoading(f"adapter {name!r} is being loaded")
            if wanted and not (len(wanted) >= _MIN_REVISION and revision.digest.startswith(wanted)):
                raise AdapterNotFound(
                    f"adapter {name!r} has no revision {wanted!r} here: expected {revision.digest} "
                    f"(or at least its first {_MIN_REVISION} characters)"
                )
            revision.users += 1
            return revision

    def release(self, revision: Revision[Placement]) -> None:
        with self._lock:
            revision.users -= 1
            assert revision.users >= 0, f"a lease of {revision.name!r} was released twice"
            gone = revision.retired and not revision.users
        if gone:
            self._remove(revision)
        for member in revision.members:
            self.release(member)

    def lease(self, revision: Revision[Placement]) -> None:
        """One more user of a revision that no name stands for, and that is not retired."""
        with self._lock:
            assert not revision.retired, f"{revision.name!r} is retired"
            revision.users += 1

    def retire(self, revision: Revision[Placement]) -> None:
        """A revision that no name stands for has no new users, and goes with its last."""
        with self._lock:
            gone = self._retire(revision)
        if gone is not None:
            self._remove(gone)

    def begin(self, name: str, source: str) -> Entry[Placement]:
        """A load starts. A name that is new (or had failed) is visible as LOADING from now on.

        Draining for a name that is being unloaded: it is free again when its last request has ended.
        """
        with self._lock:
            entry = self._entries.get(name)
            new = entry is None or entry.state is State.FAILED
            if entry is None or new:
                entry = self._entries[name] = Entry(name, State.LOADING, source)
            if entry.state is State.DRAINING:
                raise Draining(f"adapter {name!r} is being unloaded")
        if new:
            self._changed(entry, False)
        return entry

    def update(self, name: str, pinned: bool | None, weight: float | None) -> Entry[Placement]:
        """What is None stays as it is. AdapterNotFound."""
        with self._lock:
            entry = self._entry(name)
            entry.pinned = entry.pinned if pinned is None else pinned
            entry.weight = entry.weight if weight is None else weight
        self._changed(entry, False)
        return entry

    def publish(self, entry: Entry[Placement], revision: Revision[Placement], source: str, seconds: float) -> None:
        """New requests get this revision from now on; those in flight keep the old one."""
        with self._lock:
            old, entry.revision = entry.revision, revision
            entry.state, entry.source, entry.error, entry.load_seconds = State.READY, source, "", seconds
            gone = self._retire(old)
        self._changed(entry, False)
        if gone is not None:
            self._remove(gone)

    def fail(self, entry: Entry[Placement], error: str, keep: bool) -> None:
        """A load failed: a new name goes (or stays as FAILED with `keep`); an old revision goes on serving."""
        with self._lock:
            if entry.revision is not None:
                entry.error = error if keep else entry.error
            else:
                entry.state, entry.error = State.FAILED, error
                if not keep:
                    self._entries.pop(entry.name, None)
        self._changed(entry, False)

    def unload(self, name: str) -> Entry[Placement]:
        """No new requests. `removed` is done by `forget` when the last one has left and the memory is free."""
        with self._lock:
            entry = self._entry(name)
            if entry.state is State.DRAINING:
                return entry
            entry.state = State.DRAINING
            gone = self._retire(entry.revision)
            forgotten = entry.revision is None
            if forgotten:
                self._forget(entry)
        self._changed(entry, forgotten)
        if gone is not None:
            self._remove(gone)
        return entry

    def forget(self, revision: Revision[Placement]) -> None:
        """The device has let go of a retired revision. A name that was being unloaded for it is free again."""
        with self._lock:
            entry = self._entries.get(revision.name)
            if entry is None or entry.revision is not revision:
                return
            self._forget(entry)
        self._changed(entry, True)

    def _forget(self, entry: Entry[Placement]) -> None:
        self._entries.pop(entry.name, None)
        entry.removed.set_result(None)

    def _retire(self, revision: Revision[Placement] | None) -> Revision[Placement] | None:
        """The revision, if nobody uses it and it can go at once."""
        if revision is None:
            return None
        revision.retired = True
        return None if revision.users else revision

    def _entry(self, name: str) -> Entry[Placement]:
        entry = self._entries.get(name)
        if entry is None:
            raise AdapterNotFound(f"no adapter {name!r} is loaded")
        return entry
