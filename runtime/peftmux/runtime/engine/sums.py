"""Weighted sums of adapters: made off the step path when first asked for, kept while there is room.

A sum has parts of its own on the device, made from its members' files, so it needs none of theirs. A request that uses
it leases it and all of its members: a member's unload waits for such requests, and the sum goes with the member.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from peftmux.adapters.compose import sum_digest
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.runtime.engine.api import WeightedAdapter
from peftmux.runtime.engine.placement import Placed, PreparedAdapter
from peftmux.runtime.errors import AdapterMemoryExhausted, Draining
from peftmux.runtime.residency.loader import Loader, Term
from peftmux.runtime.residency.store import AdapterStore, Revision

MAX_IDLE = 32
"""Sums that nobody uses and that are kept."""

Terms = dict[Revision[Placed], float]
"""The leased members with their weights."""


class Sums:
    """Lives in the asyncio loop. `place` puts a sum on the device; its errors are the request's."""

    def __init__(
        self,
        store: AdapterStore[Placed],
        loader: Loader[PreparedAdapter],
        place: Callable[[str, PreparedAdapter], Awaitable[Placed]],
    ) -> None:
        self._store = store
        self._loader = loader
        self._place = place
        self._kept: OrderedDict[str, Revision[Placed]] = OrderedDict()
        """By digest, least recently used first."""
        self._building: dict[str, asyncio.Task[None]] = {}

    async def acquire(self, wanted: Sequence[WeightedAdapter]) -> Revision[Placed]:
        """Lease a sum; `release` it once in the store. An adapter that is named twice has the sum of its weights.

        AdapterInvalid names the adapter that cannot be summed, and why. AdapterNotFound and others as for one adapter.
        """
        terms = self._lease(wanted)
        try:
            for revision in terms:
                _check(revision)
            ((one, weight), *more) = terms.items()
            return one if weight == 1.0 and not more else await self._sum(terms)
        except BaseException:
            for revision in terms:
                self._store.release(revision)
            raise

    def forget(self, member: Revision[Placed] | None) -> None:
        """A member has been retired: its sums serve the requests that have them, and no others."""
        for digest in [d for d, revision in self._kept.items() if member in revision.members]:
            self._store.retire(self._kept.pop(digest))

    def evict(self) -> bool:
        """Let go of the sum that has been idle longest. False where every one is in use."""
        idle = next((digest for digest, revision in self._kept.items() if not revision.users), None)
        if idle is not None:
            self._store.retire(self._kept.pop(idle))
        return idle is not None

    def close(self) -> None:
        """Whoever waits for a sum is answered with Draining."""
        for task in self._building.values():
            task.cancel()

    def _lease(self, wanted: Sequence[WeightedAdapter]) -> Terms:
        terms: Terms = {}
        try:
            for weighted in wanted:
                revision = self._store.acquire(weighted.adapter)
                if revision in terms:
                    self._store.release(revision)
                terms[revision] = terms.get(revision, 0.0) + weighted.weight
        except BaseException:
            for revision in terms:
                self._store.release(revision)
            raise
        return terms

    async def _sum(self, terms: Terms) -> Revision[Placed]:
        digest = sum_digest([(revision.digest, weight) for revision, weight in terms.items()])
        if digest not in self._kept:
            await self._built(digest, terms)
        revision = self._kept.get(digest)
        if revision is None:
            if any(member.retired for member in terms):
                raise Draining("an adapter of the sum is being unloaded or replaced")
            raise AdapterMemoryExhausted("other loads took the room of this weighted sum of adapters")
        self._kept.move_to_end(digest)
        self._store.lease(revision)
        return revision

    async def _built(self, digest: str, terms: Terms) -> None:
        """One build for all who wait; it goes on when they leave, so that nothing is left half placed."""
        task = self._building.get(digest)
        if task is None:
            task = self._building[digest] = asyncio.create_task(self._build(digest, dict(terms)))
            task.add_done_callback(lambda done: self._finished(digest, done))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise Draining("the server is shutting down") from None
            raise

    async def _build(self, digest: str, terms: Terms) -> None:
        members = tuple(terms)
        prepared = await asyncio.wrap_future(self._loader.load_sum([_term(*item) for item in terms.items()], digest))
        name = "+".join(sorted(member.name for member in members))
        placed = await self._place(name, prepared)
        lowered = prepared.lowered
        revision = Revision(
            name=name,
            digest=digest,
            kind=lowered.kind,
            ranks=lowered.ranks,
            applied_sites=lowered.applied_sites,
            tensors=lowered.tensors,
            parameters=lowered.parameters,
            bytes=prepared.size,
            placement=placed,
            members=members,
        )
        if any(member.retired for member in members):
            self._store.retire(revision)
            return
        self._kept[digest] = revision
        while sum(not kept.users for kept in self._kept.values()) > MAX_IDLE:
            self.evict()

    def _finished(self, digest: str, task: asyncio.Task[None]) -> None:
        del self._building[digest]
        with suppress(asyncio.CancelledError):
            task.exception()  # read by those who wait, if any still do


def _term(revision: Revision[Placed], weight: float) -> Term:
    assert revision.folder is not None, f"{revision.name!r} has no files"
    return Term(revision.name, revision.folder, revision.digest, weight)


def _check(revision: Revision[Placed]) -> None:
    if revision.placement.obstacle:
        raise AdapterInvalid(
            Reason.NOT_SUMMABLE,
            f"adapter {revision.name!r}, of kind {revision.kind}, cannot be a term of a weighted sum: expected low "
            f"rank, sparse changes and biases only, got {revision.placement.obstacle}",
        )
