"""The engine in this process, for one asyncio loop: implements `AsyncEngine`."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path

from peftmux.runtime.engine.adapters import AdapterManager
from peftmux.runtime.engine.api import AdapterInfo, Delta, EngineStats, GenerationRequest, ModelInfo
from peftmux.runtime.engine.checks import check_request
from peftmux.runtime.engine.core import Deliveries, EngineCore, max_new_tokens
from peftmux.runtime.engine.mailbox import Mailbox
from peftmux.runtime.engine.placement import Placed
from peftmux.runtime.engine.request import ActiveRequest
from peftmux.runtime.engine.text import Text
from peftmux.runtime.engine.thread import EngineThread
from peftmux.runtime.errors import DeadlineExceeded, Draining, EngineDead
from peftmux.runtime.residency.store import Revision

_POLL_SECONDS = 0.02


class LocalEngine:
    """Made by `factory.start_engine`. Methods are called in the loop that made it."""

    def __init__(
        self,
        info: ModelInfo,
        text: Text,
        core: EngineCore,
        thread: EngineThread,
        adapters: AdapterManager,
        end_token_ids: Sequence[int],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._info = info
        self._text = text
        self._core = core
        self._thread = thread
        self._adapters = adapters
        self._end_token_ids = frozenset(end_token_ids)
        self._loop = loop
        self._ids = itertools.count(1)
        self._open = 0
        self._draining = False

    @property
    def info(self) -> ModelInfo:
        return self._info

    def encode(self, text: str) -> tuple[int, ...]:
        return self._text.encode(text)

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        return self._text.encode_chat(messages)

    def pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        return self._text.pieces(ids)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        if self._draining:
            raise Draining("the server is shutting down")
        check_request(request, self._info)
        revision = self._adapters.store.acquire(request.adapter) if request.adapter else None
        mailbox = Mailbox()
        try:
            active = self._activate(request, revision, mailbox)
            self._thread.post(lambda: self._core.add(active))
        except BaseException:
            if revision is not None:
                self._adapters.store.release(revision)
            raise
        self._open += 1
        done = False
        try:
            while not done:
                delta = await mailbox.get()
                done = delta.finish_reason is not None
                yield delta
        except Exception:
            done = True
            raise
        finally:
            self._open -= 1
            if not done:
                with suppress(EngineDead):  # then nothing is left to free
                    self._thread.post(lambda: self._core.abort(active.id))

    async def load_adapter(
        self,
        name: str,
        source: str,
        *,
        revision: str = "",
        pinned: bool = False,
        wait: bool = True,
        replace: bool = False,
    ) -> AdapterInfo:
        if self._draining:
            raise Draining("the server is shutting down")
        return await self._adapters.load(name, source, revision=revision, pinned=pinned, wait=wait, replace=replace)

    async def load_at_start(self, name: str, folder: str) -> AdapterInfo:
        """An adapter of the command line; the folder may lie outside the adapter root."""
        return await self._adapters.load_at_start(name, Path(folder))

    async def unload_adapter(self, name: str, *, wait: bool = True) -> AdapterInfo:
        return await self._adapters.unload(name, wait)

    def get_adapter(self, name: str) -> AdapterInfo:
        return self._adapters.info(self._adapters.store.get(name))

    def list_adapters(self) -> tuple[AdapterInfo, ...]:
        return tuple(self._adapters.info(entry) for entry in self._adapters.store.entries())

    def stats(self) -> EngineStats:
        """Read beside the running engine: counts may be one step apart from each other."""
        scheduler = self._core.scheduler
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            kv_cache_usage=scheduler.usage(),
            adapters=self.list_adapters(),
            running_by_adapter=scheduler.running_by_key(),
            waiting_by_adapter=scheduler.waiting_by_key(),
            healthy=self._thread.healthy,
        )

    async def drain(self, grace_seconds: float) -> None:
        self._draining = True
        until = time.monotonic() + grace_seconds
        while self._open and time.monotonic() < until and self._thread.healthy:
            await asyncio.sleep(_POLL_SECONDS)
        if self._open and self._thread.healthy:
            error = Draining("the server shut down before the request was finished")
            await asyncio.wrap_future(self._thread.ask(lambda: self._core.abort_all(error)))
        while self._open and self._thread.healthy and time.monotonic() < until + 1.0:
            await asyncio.sleep(_POLL_SECONDS)
        self._adapters.close()
        await asyncio.to_thread(self._thread.stop, 5.0)

    def deliver(self, deliveries: Deliveries) -> None:
        """Called in the engine's thread: one wake-up of the loop for a whole step."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_hand_out, deliveries)

    def _activate(
        self, request: GenerationRequest, revision: Revision[Placed] | None, mailbox: Mailbox
    ) -> ActiveRequest:
        if request.deadline is not None and request.deadline <= time.monotonic():
            raise DeadlineExceeded("the deadline has passed before the request could start")
        prefix = revision.placement.prefix if revision else None
        limit = max_new_tokens(
            len(request.prompt),
            prefix.length if prefix else 0,
            request.stopping.max_tokens,
            self._info.context_length,
            self._core.scheduler.max_row_tokens(prefix),
        )
        ends = frozenset(request.stopping.stop_token_ids)
        if not request.stopping.ignore_eos:
            ends |= self._end_token_ids
        stream = self._text.stream(request.prompt, request.stopping)
        return ActiveRequest(next(self._ids), request, revision, stream, ends, limit, mailbox.put)


def _hand_out(deliveries: Deliveries) -> None:
    for active, outcome in deliveries:
        active.sink(outcome)
