"""The adapter root followed: what appears in it is loaded, what changes is replaced, what goes is unloaded.

Polled, since changes on network volumes raise no events. A folder is taken when two scans in a row see the same files
in it, so one that is still being copied waits, and goes when two scans in a row do not see it. A folder that cannot
be served is reported (log, metric, its FAILED entry) and left alone until its files change.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping
from contextlib import suppress

from peftmux.adapters.errors import AdapterError
from peftmux.runtime.engine.adapters import AdapterManager
from peftmux.runtime.errors import AdapterMemoryExhausted, AdapterNotFound, Draining, RuntimeFailure
from peftmux.runtime.residency.folders import Signature, scan

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 30.0
"""Until a folder that found no memory is tried again."""


class Follower:
    """Lives in the engine's asyncio loop, from `start` to `close`."""

    def __init__(self, adapters: AdapterManager, root: str, seconds: float) -> None:
        self._adapters = adapters
        self._root = root
        self._seconds = seconds
        self._seen: Mapping[str, Signature] = {}
        """By the last scan."""
        self._taken: dict[str, Signature] = {}
        """What each folder was when it was loaded, or refused."""
        self._not_before: dict[str, float] = {}
        self._busy: dict[str, asyncio.Task[None]] = {}
        self._loop: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load what is there, and follow from then on. OSError where the root cannot be read."""
        self._seen = await asyncio.to_thread(scan, self._root)
        self._act(self._seen)
        await asyncio.gather(*self._busy.values())
        self._loop = asyncio.create_task(self._follow())

    def close(self) -> None:
        """No more loads begin; those under way are the manager's to end."""
        if self._loop is not None:
            self._loop.cancel()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            try:
                found = await asyncio.to_thread(scan, self._root)
            except OSError as error:  # a volume that is away is no reason to unload what it held
                logger.warning("the adapter root cannot be read: %s", error)
                continue
            self._act(found)
            self._seen = found

    def _act(self, found: Mapping[str, Signature]) -> None:
        for name, signature in found.items():
            if self._seen.get(name) == signature != self._taken.get(name) and self._may_try(name):
                self._start(name, self._take(name, signature))
        for name in [name for name in self._taken if name not in found and name not in self._seen]:
            if name not in self._busy:
                self._start(name, self._let_go(name))

    def _may_try(self, name: str) -> bool:
        return name not in self._busy and time.monotonic() >= self._not_before.get(name, 0.0)

    def _start(self, name: str, work: Coroutine[None, None, None]) -> None:
        task = self._busy[name] = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._busy.pop(name, None))

    async def _take(self, name: str, signature: Signature) -> None:
        try:
            info = await self._adapters.follow(name)
        except Draining:  # it is being unloaded: the next scan tries again
            return
        except AdapterMemoryExhausted as error:
            self._not_before[name] = time.monotonic() + _RETRY_SECONDS
            logger.warning("adapter %s not loaded, tried again in %g s: %s", name, _RETRY_SECONDS, error)
            return
        except (AdapterError, RuntimeFailure) as error:
            logger.warning("adapter %s not loaded: %s", name, error)
        except Exception:
            logger.exception("adapter %s not loaded", name)
        else:
            logger.info("adapter %s: %s, revision %s", name, info.kind, info.revision)
        self._taken[name] = signature

    async def _let_go(self, name: str) -> None:
        del self._taken[name]
        with suppress(AdapterNotFound, Draining):
            if await self._adapters.unfollow(name):
                logger.info("adapter %s unloaded: its folder is gone", name)
