"""Loading and unloading adapters while the engine runs: loader threads, the store, and the engine's thread in turn."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from peftmux.adapters.errors import AdapterError, AdapterInvalid, SourceNotFound
from peftmux.adapters.source import NAME_RULE, valid_name
from peftmux.runtime.engine.api import AdapterInfo, AdapterState, ResidencyLevel
from peftmux.runtime.engine.observer import EngineObserver
from peftmux.runtime.engine.placement import DevicePlacement, Placed, PreparedAdapter
from peftmux.runtime.engine.sums import Sums
from peftmux.runtime.engine.thread import EngineThread
from peftmux.runtime.engine.watch import Watchers
from peftmux.runtime.errors import (
    AdapterExists,
    AdapterMemoryExhausted,
    Draining,
    EngineDead,
    InvalidRequest,
    RuntimeFailure,
)
from peftmux.runtime.residency.loader import Loader
from peftmux.runtime.residency.store import AdapterStore, Entry, Revision

DIGEST_DIFFERS = "REVISION_DIFFERS"


@dataclass(frozen=True, slots=True)
class _Job:
    """One LoadAdapter call."""

    name: str
    source: str
    folder: Path
    revision: str
    pinned: bool
    replace: bool


@dataclass(slots=True)
class _Turn:
    """One name's turns. Kept while somebody has it or waits for it."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    takers: int = 0


Work = Callable[[], Awaitable[AdapterInfo]]


class AdapterManager:
    """One load or unload at a time for each name; names do not wait for each other. Lives in the asyncio loop."""

    def __init__(
        self,
        loader: Loader[PreparedAdapter],
        placement: DevicePlacement,
        thread: EngineThread,
        observer: EngineObserver,
    ) -> None:
        self._loader = loader
        self._placement = placement
        self._thread = thread
        self._observer = observer
        self.store: AdapterStore[Placed] = AdapterStore(self._remove, self._changed)
        self._watchers = Watchers()
        self.sums = Sums(self.store, loader, self._place)
        self._turns: dict[str, _Turn] = {}
        self._tasks: set[asyncio.Task[AdapterInfo]] = set()

    async def load(
        self, name: str, source: str, *, revision: str, pinned: bool, wait: bool, replace: bool
    ) -> AdapterInfo:
        """As the LoadAdapter call says. Raises what it answers with."""
        _check_name(name)
        folder = self._loader.resolve(source)
        job = _Job(name, source, folder, revision, pinned, replace)
        known = self.store.find(name)
        taken = known is not None and known.revision is not None and not replace
        if wait or taken:
            return await self._in_turn(name, lambda: self._load(job, keep_failure=False))
        entry = self.store.begin(name, source)
        self._start(name, lambda: self._load(job, keep_failure=True))
        return self.info(entry)

    async def load_at_start(self, name: str, folder: Path) -> AdapterInfo:
        """As the operator says on the command line, so the folder may lie outside the adapter root."""
        _check_name(name)
        if not folder.is_dir():
            raise SourceNotFound(f"no adapter folder {str(folder)!r}")
        job = _Job(name, str(folder), folder, "", False, False)
        return await self._in_turn(name, lambda: self._load(job, keep_failure=False))

    async def follow(self, name: str) -> AdapterInfo:
        """Load or replace `name` from its folder in the adapter root; a failure stays visible. AdapterExists for a
        name that was loaded from elsewhere."""
        _check_name(name)
        return await self._in_turn(name, lambda: self._follow(name))

    async def unfollow(self, name: str) -> bool:
        """Unload `name` if it came from its folder in the adapter root. AdapterNotFound."""
        if self.store.get(name).source != name:
            return False
        await self._in_turn(name, lambda: self._unload(name, wait=False))
        return True

    async def unload(self, name: str, wait: bool) -> AdapterInfo:
        return await self._in_turn(name, lambda: self._unload(name, wait))

    def update(self, name: str, pinned: bool | None, weight: float | None) -> AdapterInfo:
        """What is None stays. The weight counts for requests that come from now on."""
        if weight is not None and not 0 < weight < math.inf:
            raise InvalidRequest("weight", f"expected a positive number, got {weight:g}")
        return self.info(self.store.update(name, pinned, weight))

    def weight(self, revision: Revision[Placed] | None) -> float:
        """The share of service of its name; 1 for the base model and for sums of several."""
        entry = self.store.find(revision.name) if revision else None
        return entry.weight if entry else 1.0

    def watch(self) -> AsyncIterator[AdapterInfo]:
        return self._watchers.watch(lambda: [self.info(entry) for entry in self.store.entries()])

    def info(self, entry: Entry[Placed]) -> AdapterInfo:
        revision = entry.revision
        if revision is None:
            return AdapterInfo(
                entry.name, AdapterState(entry.state.value), pinned=entry.pinned, error=entry.error, source=entry.source
            )
        return AdapterInfo(
            name=entry.name,
            state=AdapterState(entry.state.value),
            revision=revision.digest,
            kind=revision.kind,
            residency=ResidencyLevel.DEVICE,
            pinned=entry.pinned,
            min_rank=revision.ranks[0],
            max_rank=revision.ranks[1],
            applied_sites=revision.applied_sites,
            tensors=revision.tensors,
            parameters=revision.parameters,
            bytes=revision.bytes,
            error=entry.error,
            load_seconds=entry.load_seconds,
            requests_in_flight=revision.users,
            weight=entry.weight,
            source=entry.source,
        )

    def leave(self) -> None:
        """The server begins to shut down: whoever watches is answered with Draining."""
        self._watchers.close()

    def close(self) -> None:
        """Whoever waits for a load or an unload is answered with Draining."""
        self._watchers.close()
        self._loader.close()
        self.sums.close()
        for task in self._tasks:
            task.cancel()

    async def _in_turn(self, name: str, work: Work) -> AdapterInfo:
        # a caller that goes away must not leave the work half done
        return await asyncio.shield(self._start(name, work))

    def _start(self, name: str, work: Work) -> asyncio.Task[AdapterInfo]:
        task = asyncio.create_task(self._take_turn(name, work))
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    async def _take_turn(self, name: str, work: Work) -> AdapterInfo:
        turn = self._turns.setdefault(name, _Turn())
        turn.takers += 1
        try:
            async with turn.lock:
                return await work()
        except asyncio.CancelledError:
            raise Draining("the server is shutting down") from None
        finally:
            turn.takers -= 1
            if not turn.takers:
                del self._turns[name]

    async def _follow(self, name: str) -> AdapterInfo:
        known = self.store.find(name)
        if known is not None and known.source != name:
            raise AdapterExists(f"adapter {name!r} is loaded from {known.source!r}: its folder is left alone")
        entry = self.store.begin(name, name)
        try:
            folder = self._loader.resolve(name)
        except AdapterError as error:
            self._fail(entry, str(error), keep=True)
            raise
        return await self._load(_Job(name, name, folder, "", entry.pinned, True), keep_failure=True)

    async def _load(self, job: _Job, keep_failure: bool) -> AdapterInfo:
        entry = self.store.begin(job.name, job.source)
        started = time.monotonic()
        try:
            prepared = await asyncio.wrap_future(self._loader.load(job.folder))
            return await self._publish(entry, job, prepared, started)
        except (AdapterError, RuntimeFailure) as error:
            self._fail(entry, str(error), keep_failure)
            raise
        except BaseException:
            self._fail(entry, "internal error", keep_failure)
            raise

    def _fail(self, entry: Entry[Placed], error: str, keep: bool) -> None:
        self.store.fail(entry, error, keep)
        self._observer.adapter_refused()

    async def _publish(self, entry: Entry[Placed], job: _Job, prepared: PreparedAdapter, started: float) -> AdapterInfo:
        lowered = prepared.lowered
        if job.revision and job.revision != lowered.digest:
            raise AdapterInvalid(DIGEST_DIFFERS, f"expected revision {job.revision}, got {lowered.digest}")
        old = entry.revision
        if old is not None and old.digest == lowered.digest:
            return self.info(entry)
        if old is not None and not job.replace:
            raise AdapterExists(
                f"adapter {job.name!r} is loaded with revision {old.digest}, got other content "
                f"({lowered.digest}): set replace to make it the new revision"
            )
        placed = await self._place(job.name, prepared)
        revision = Revision(
            name=job.name,
            digest=lowered.digest,
            kind=lowered.kind,
            ranks=lowered.ranks,
            applied_sites=lowered.applied_sites,
            tensors=lowered.tensors,
            parameters=lowered.parameters,
            bytes=prepared.size,
            placement=placed,
            folder=job.folder,
        )
        entry.pinned = job.pinned
        seconds = time.monotonic() - started
        self.store.publish(entry, revision, job.source, seconds)
        self.sums.forget(old)
        self._observer.adapter_loaded(seconds)
        return self.info(entry)

    async def _place(self, name: str, prepared: PreparedAdapter) -> Placed:
        """On the device, its virtual tokens computed a chunk at a time: rows that run have a step between two."""
        placed = await self._make_room(name, prepared)
        try:
            for chunk in self._placement.chunks(placed, prepared):
                await asyncio.wrap_future(self._thread.ask(partial(self._placement.compute, chunk)))
        except BaseException:
            with suppress(EngineDead):
                self._thread.post(lambda: self._placement.remove(placed))
            raise
        return placed

    async def _make_room(self, name: str, prepared: PreparedAdapter) -> Placed:
        """Weighted sums that nobody uses make room, least recently used first."""
        while True:
            try:
                return await asyncio.wrap_future(self._thread.ask(lambda: self._placement.place(name, prepared)))
            except AdapterMemoryExhausted:
                if not self.sums.evict():
                    raise

    async def _unload(self, name: str, wait: bool) -> AdapterInfo:
        entry = self.store.unload(name)
        self.sums.forget(entry.revision)
        if wait:
            await asyncio.wrap_future(entry.removed)
        info = self.info(entry)
        return _unloaded(info) if entry.removed.done() else info

    def _remove(self, revision: Revision[Placed]) -> None:
        """Called by the store, in any thread, for a retired revision without users."""

        def remove() -> None:
            self._placement.remove(revision.placement)
            self.store.forget(revision)

        try:
            self._thread.post(remove)
        except EngineDead:  # and the device's memory with it
            self.store.forget(revision)

    def _changed(self, entry: Entry[Placed], gone: bool) -> None:
        """Called by the store, in any thread."""
        info = self.info(entry)
        self._watchers.tell(_unloaded(info) if gone else info)

    def _finished(self, task: asyncio.Task[AdapterInfo]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # shown by GetAdapter; read here so that asyncio does not complain


def _unloaded(info: AdapterInfo) -> AdapterInfo:
    return replace(info, state=AdapterState.UNLOADED, residency=None, bytes=0, requests_in_flight=0)


def _check_name(name: str) -> None:
    if not valid_name(name):
        raise InvalidRequest("name", f"expected a name of {NAME_RULE}, got {name!r}")
