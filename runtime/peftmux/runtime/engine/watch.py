"""Who watches the adapters: each sees them as they are, then every change in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress

from peftmux.runtime.engine.api import AdapterInfo
from peftmux.runtime.errors import Draining, QueueFull, RuntimeFailure

MAX_BEHIND = 4096
"""Changes that a watcher may be behind before it is told to begin anew: none is ever left out."""


class _Watcher:
    """Lives in the loop of the one who watches; `tell` and `end` may be called in any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changes: deque[AdapterInfo] = deque()
        self._over: RuntimeFailure | None = None
        self._news = asyncio.Event()

    def tell(self, info: AdapterInfo) -> None:
        self._post(lambda: self._note(info))

    def end(self, failure: RuntimeFailure) -> None:
        self._post(lambda: self._finish(failure))

    async def next(self) -> AdapterInfo:
        """Raises what it was ended with, after the changes before that."""
        while not self._changes:
            if self._over is not None:
                raise self._over
            self._news.clear()
            await self._news.wait()
        return self._changes.popleft()

    def _post(self, call: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody watches any more
            self._loop.call_soon_threadsafe(call)

    def _note(self, info: AdapterInfo) -> None:
        if self._over is None and len(self._changes) >= MAX_BEHIND:
            self._finish(QueueFull(f"{MAX_BEHIND} changes of adapters have not been read: watch them again"))
        if self._over is None:
            self._changes.append(info)
            self._news.set()

    def _finish(self, failure: RuntimeFailure) -> None:
        self._over = self._over or failure
        self._news.set()


class Watchers:
    """`tell` and `close` may be called in any thread."""

    def __init__(self) -> None:
        self._watchers: set[_Watcher] = set()
        self._closed = False

    async def watch(self, now: Callable[[], Iterable[AdapterInfo]]) -> AsyncIterator[AdapterInfo]:
        """What there is `now`, then each change. Draining when the server leaves, QueueFull for a reader too slow."""
        if self._closed:
            raise Draining("the server is shutting down")
        watcher = _Watcher()
        self._watchers = self._watchers | {watcher}  # never changed in place: other threads go through it
        try:
            for info in now():
                yield info
            while True:
                yield await watcher.next()
        finally:
            self._watchers = self._watchers - {watcher}

    def tell(self, info: AdapterInfo) -> None:
        for watcher in self._watchers:
            watcher.tell(info)

    def close(self) -> None:
        self._closed = True
        for watcher in self._watchers:
            watcher.end(Draining("the server is shutting down"))
