"""The engine in this process, for one asyncio loop: implements `AsyncEngine`."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from peftmux.runtime.engine import readout
from peftmux.runtime.engine.adapters import AdapterManager
from peftmux.runtime.engine.api import (
    AdapterInfo,
    Classification,
    ClassificationRequest,
    Delta,
    Embedding,
    EmbeddingRequest,
    EngineStats,
    GenerationRequest,
    ModelInfo,
)
from peftmux.runtime.engine.checks import check_images, check_prompt, check_request, check_task
from peftmux.runtime.engine.core import Deliveries, EngineCore, max_new_tokens
from peftmux.runtime.engine.follow import Follower
from peftmux.runtime.engine.images import decode_images, place_images
from peftmux.runtime.engine.mailbox import Mailbox
from peftmux.runtime.engine.placement import BASE, Placed
from peftmux.runtime.engine.request import ActiveRequest, NoText
from peftmux.runtime.engine.text import Text
from peftmux.runtime.engine.thread import EngineThread
from peftmux.runtime.engine.virtual import fill_template, without_trailing
from peftmux.runtime.errors import DeadlineExceeded, Draining, EngineDead
from peftmux.runtime.params import Readout
from peftmux.runtime.residency.store import Revision
from peftmux.runtime.scheduler.plan import ImageSpan

Choice = Callable[[Placed], Readout | None]
"""What a request reads under the adapter it names, or None to generate. TaskMismatch where that adapter cannot."""
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
        pad_token_id: int | None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._info = info
        self._text = text
        self._core = core
        self._thread = thread
        self._adapters = adapters
        self._end_token_ids = frozenset(end_token_ids)
        self._pad = pad_token_id
        self._loop = loop
        self._ids = itertools.count(1)
        self._open = 0
        self._draining = False
        self._follower: Follower | None = None

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def healthy(self) -> bool:
        return self._thread.healthy

    def encode(self, text: str) -> tuple[int, ...]:
        return self._text.encode(text)

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        return self._text.encode_chat(messages)

    def encode_around(self, text: str | Sequence[tuple[str, str]], marker: str) -> tuple[tuple[int, ...], ...]:
        return self._text.encode_around(text, marker)

    def pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        return self._text.pieces(ids)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        check_request(request, self._info)
        revision, digest = None, b""
        if request.adapters:
            revision = await self._adapters.sums.acquire(request.adapters)
        elif request.images and request.adapter:
            request, revision, digest = await self._decoded(request)
        mailbox = Mailbox()
        active = self._start(request, mailbox, readout.of_generation, revision, digest)
        with self._running(active, mailbox):
            over = False
            while not over:
                delta = await mailbox.get()
                over = delta.finish_reason is not None
                yield delta

    async def _decoded(self, request: GenerationRequest) -> tuple[GenerationRequest, Revision[Placed], bytes]:
        """With image files made into patches, off the loop; its adapter, leased, whose rule it was; what they show."""
        revision = self._adapters.store.acquire(request.adapter)
        rule = revision.placement.images
        if rule is None:
            return request, revision, b""
        try:
            decoded = await asyncio.to_thread(decode_images, request.images, rule)
        except BaseException:
            self._adapters.store.release(revision)
            raise
        return replace(request, images=decoded.images), revision, decoded.digest

    async def classify(self, request: ClassificationRequest) -> Classification:
        check_prompt(request.prompt, self._info)
        active, delta = await self._read(request, readout.of_classification)
        assert active.revision is not None
        return readout.classification(delta, active.revision.placement.labels, len(request.prompt))

    async def embed(self, request: EmbeddingRequest) -> Embedding:
        check_prompt(request.prompt, self._info)
        _, delta = await self._read(request, lambda placed: readout.of_embedding(request))
        assert delta.usage is not None
        return Embedding(readout.embedding(delta, request), delta.usage, delta.adapter_revision)

    async def _read(
        self, request: ClassificationRequest | EmbeddingRequest, choose: Choice
    ) -> tuple[ActiveRequest, Delta]:
        """Run a request that generates nothing."""
        row = GenerationRequest(
            request.prompt,
            request.adapter,
            priority=request.priority,
            deadline=request.deadline,
            stream=False,
            task=request.task,
        )
        mailbox = Mailbox()
        active = self._start(row, mailbox, choose)
        with self._running(active, mailbox):
            return active, await mailbox.get()

    def _start(
        self,
        request: GenerationRequest,
        mailbox: Mailbox,
        choose: Choice,
        revision: Revision[Placed] | None = None,
        images_digest: bytes = b"",
    ) -> ActiveRequest:
        """Lease its adapter and hand it to the engine's thread, or raise what it is refused with.

        `revision` is leased already, where it is a weighted sum or has images decoded.
        """
        if revision is None and request.adapter and not self._draining:
            revision = self._adapters.store.acquire(request.adapter)
        try:
            if self._draining:
                raise Draining("the server is shutting down")
            active = self._activate(request, revision, mailbox, choose, images_digest)
            self._thread.post(lambda: self._core.add(active))
        except BaseException:
            if revision is not None:
                self._adapters.store.release(revision)
            raise
        return active

    @contextmanager
    def _running(self, active: ActiveRequest, mailbox: Mailbox) -> Iterator[None]:
        """However the block ends, the row and its cache are free within one step."""
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            if not mailbox.over:
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

    async def follow_root(self, root: str, seconds: float) -> None:
        """Load what the adapter root holds, then look every so many seconds for what appears, changes or goes."""
        self._follower = Follower(self._adapters, root, seconds)
        await self._follower.start()

    async def warm_up(self) -> None:
        """Before the first request, so that none waits for it."""
        await asyncio.wrap_future(self._thread.ask(self._core.warm_up))

    async def unload_adapter(self, name: str, *, wait: bool = True) -> AdapterInfo:
        return await self._adapters.unload(name, wait)

    async def update_adapter(
        self, name: str, *, pinned: bool | None = None, weight: float | None = None
    ) -> AdapterInfo:
        return self._adapters.update(name, pinned, weight)

    def watch_adapters(self) -> AsyncIterator[AdapterInfo]:
        return self._adapters.watch()

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
            healthy=self.healthy,
        )

    async def drain(self, grace_seconds: float) -> None:
        self._draining = True
        if self._follower is not None:
            self._follower.close()
        self._adapters.leave()
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
        self,
        request: GenerationRequest,
        revision: Revision[Placed] | None,
        mailbox: Mailbox,
        choose: Choice,
        images_digest: bytes,
    ) -> ActiveRequest:
        if request.deadline is not None and request.deadline <= time.monotonic():
            raise DeadlineExceeded("the deadline has passed before the request could start")
        placed = revision.placement if revision else BASE
        check_task(request, placed)
        reads = choose(placed)
        prefix = placed.prefix(request.task)
        virtual = prefix.length if prefix else 0
        context, capacity = self._info.context_length, self._core.scheduler.max_row_tokens(prefix)
        weight = self._adapters.weight(revision)
        tokens = fill_template(request.prompt, placed.template)
        if reads is not None:
            readout.check_room(len(tokens), virtual, context, capacity)
            if reads is Readout.SEQUENCE:
                pad = None if placed.reads_padding else self._pad
                tokens = readout.classified_part(request.prompt, pad)
                request = replace(request, prompt=tokens)
            tokens = without_trailing(tokens)
            return ActiveRequest(
                next(self._ids), request, tokens, revision, NoText(), frozenset(), 1, mailbox.put, reads, weight=weight
            )
        stream = self._text.stream(request.stopping)
        spans: tuple[ImageSpan, ...] = ()
        check_images(request, placed)
        if placed.images is not None and request.images:
            tokens, spans = place_images(request.prompt, request.images, placed.images)
            request = replace(request, prompt=tokens)
        beside = virtual + len(tokens) - len(request.prompt)
        limit = max_new_tokens(len(request.prompt), beside, request.stopping.max_tokens, context, capacity)
        ends = frozenset(request.stopping.stop_token_ids)
        if not request.stopping.ignore_eos:
            ends |= self._end_token_ids
        return ActiveRequest(
            next(self._ids),
            request,
            tokens,
            revision,
            stream,
            ends,
            limit,
            mailbox.put,
            images=spans,
            images_digest=images_digest,
            weight=weight,
        )


def _hand_out(deliveries: Deliveries) -> None:
    for active, outcome in deliveries:
        active.sink(outcome)
