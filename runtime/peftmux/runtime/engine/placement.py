"""Adapters on the device: a slot in every site they change, and cache blocks for a prefix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftmux.adapters.compose import obstacle
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.images import ImageRule
from peftmux.adapters.parts import IMAGES, KVPrefix, LoweredAdapter, TokenGroup, VisionPart
from peftmux.kernels.placed import placed
from peftmux.kernels.tree import mapped, tensors
from peftmux.runtime.engine.virtual import Chunk, chunks
from peftmux.runtime.errors import AdapterMemoryExhausted
from peftmux.runtime.model.cache import block_bytes
from peftmux.runtime.model.ladders import SideCache
from peftmux.runtime.model.loaded import LoadedModel
from peftmux.runtime.model.runner import Runner
from peftmux.runtime.model.sites import Site, SiteGroup
from peftmux.runtime.model.upload import Upload
from peftmux.runtime.params import Readout
from peftmux.runtime.scheduler import PrefixBlocks, Scheduler

_READOUTS = {"sequence": Readout.SEQUENCE, "token": Readout.TOKENS}


@dataclass(frozen=True, slots=True, eq=False)
class PreparedAdapter:
    """Laid out for the device, not yet in it: what a loader thread hands to the engine's thread."""

    lowered: LoweredAdapter
    sites: tuple[tuple[Site, Any], ...]
    """Each with what its `prepare` made."""
    salt: bytes
    """Names this adapter's keys and values in the prefix cache; b"" where they are the base model's."""
    size: int
    """Bytes on the device."""
    upload: Upload
    """On its way until this is waited for."""
    stored: KVPrefix | None = None
    """The prefix's keys and values in the cache's dtype, on the device."""
    virtual: Tensor | None = None
    """[prompts, n, D] in the model's dtype on the CPU: what `DevicePlacement.chunks` computes."""
    caches: tuple[SideCache, ...] = ()
    """What it shares with other adapters, beside `size`."""

    def tensors(self) -> Iterator[Tensor]:
        """All that steps will read or write of it."""
        yield from tensors([prepared for _, prepared in self.sites])
        yield from tensors(self.stored)
        yield from tensors([cache.layers for cache in self.caches])


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """An adapter on the device. Owned by its revision in the store."""

    slot: int
    prefixes: tuple[PrefixBlocks, ...]
    """None, one, or one for each task, all of one length."""
    first_position: int
    salt: bytes
    invocation: tuple[int, ...]
    size: int
    """Bytes on the device."""
    sites: tuple[Site, ...]
    readout: Readout | None = None
    """What its head reads; None for an adapter without one, which generates."""
    labels: tuple[str, ...] = ()
    """Of its head."""
    reads_padding: bool = False
    """Its head does: see `kernels.head.Head`."""
    tasks: int = 0
    """Of a multi-task adapter; 0 for any other."""
    images: ImageRule | None = None
    """Of an adapter that takes images."""
    template: tuple[TokenGroup, ...] = ()
    """Virtual tokens among a request's own."""
    caches: tuple[SideCache, ...] = ()
    """What it shares with other adapters, beside `size`."""
    obstacle: str = ""
    """Why it cannot be a term of a weighted sum; "" where it can."""

    @property
    def position_offset(self) -> int:
        return self.first_position - (self.prefixes[0].length if self.prefixes else 0)

    def prefix(self, task: int | None) -> PrefixBlocks | None:
        """What stands before a row of this task; None is an adapter without tasks."""
        return self.prefixes[task or 0] if self.prefixes else None

    def salt_of(self, task: int | None) -> bytes:
        """Names the keys and values of this task's rows in the prefix cache."""
        return self.salt if task is None else self.salt + b"task" + task.to_bytes(4)


BASE = Placed(slot=0, prefixes=(), first_position=0, salt=b"", invocation=(), size=0, sites=())
"""The base model: nothing on top."""


def prepare(model: LoadedModel, lowered: LoweredAdapter, block_size: int) -> PreparedAdapter:
    """Cast and lay out an adapter's parts. Safe in a loader thread: touches nothing that a step reads.

    AdapterInvalid for values that overflow the base's dtype, and for a prefix that leaves no room for a prompt.
    """
    prefix = lowered.parts.prefix or lowered.parts.virtual
    tokens = (prefix.length if prefix else 0) + sum(group.tokens for group in lowered.parts.template)
    if tokens >= model.context_length - 1:
        raise AdapterInvalid(
            Reason.TOO_LARGE,
            f"expected at most {model.context_length - 2} virtual tokens in a context of {model.context_length}, "
            f"got {tokens}",
        )
    upload = Upload(model.device)
    try:
        with upload:
            sites = _prepare_sites(model, lowered, upload)
            stored = _prepare_prefix(model, lowered, upload)
            virtual = _prepare_virtual(model, lowered)
    except ValueError as error:
        raise AdapterInvalid(Reason.NOT_FINITE, f"in {model.dtype}: {error}") from error
    size = sum(prepared.nbytes for _, prepared in sites)
    if prefix is not None:
        count = 1 if virtual is None else len(virtual)
        size += count * -(-prefix.length // block_size) * block_bytes(model.kv_shapes, block_size, model.dtype)
    caches = tuple(prepared.cache for site, prepared in sites if site is model.ladders)
    return PreparedAdapter(lowered, sites, _salt(model, lowered, caches), size, upload, stored, virtual, caches)


def _prepare_prefix(model: LoadedModel, lowered: LoweredAdapter, upload: Upload) -> KVPrefix | None:
    """In the cache's dtype."""
    stored = lowered.parts.prefix
    if stored is None:
        return None
    return mapped(upload.move(stored), lambda t: placed(t, model.device, model.dtype, "a prefix's keys and values"))


def _prepare_virtual(model: LoadedModel, lowered: LoweredAdapter) -> Tensor | None:
    if lowered.parts.virtual is None:
        return None
    return placed(lowered.parts.virtual.embeddings, torch.device("cpu"), model.dtype, "virtual tokens")


def _prepare_sites(model: LoadedModel, lowered: LoweredAdapter, upload: Upload) -> tuple[tuple[Site, Any], ...]:
    sites: list[tuple[Site, Any]] = []
    linear = lowered.parts.linear
    for group, names in _by_group(model, lowered).items():
        own = [None if n is None else upload.move(linear[n]) for n in names]
        sites.append((group.lowrank, group.lowrank.prepare(own)))
    for name, parts in lowered.parts.others.items():
        for part in parts:
            site = model.places[type(part), name]
            sites.append((site, site.prepare(upload.move(part))))
    if lowered.parts.head is not None:
        sites.append((model.heads, model.heads.prepare(upload.move(lowered.parts.head))))
    return tuple(sites)


def _by_group(model: LoadedModel, lowered: LoweredAdapter) -> dict[SiteGroup, list[str | None]]:
    """The adapter's linear sites by the product they share, in the order of its slices."""
    groups: dict[SiteGroup, list[str | None]] = {}
    for name in lowered.parts.linear:
        ref = model.sites[name]
        groups.setdefault(ref.group, [None] * len(ref.group.sites))[ref.index] = name
    return groups


def _salt(model: LoadedModel, lowered: LoweredAdapter, caches: Sequence[SideCache]) -> bytes:
    """An adapter of the output projection alone shares the base model's keys and values.

    A side network's keys and values end with their cache, whose name is part of the salt.
    """
    parts = lowered.parts
    touches = bool(parts.places - {model.head}) or parts.prefix is not None or parts.virtual is not None
    names = b"".join(cache.name for cache in caches)
    return bytes.fromhex(lowered.digest) + names if touches else b""


def _image_rule(lowered: LoweredAdapter) -> ImageRule | None:
    for part in lowered.parts.others.get(IMAGES, ()):
        if isinstance(part, VisionPart):
            return ImageRule.of(part)
    return None


class DevicePlacement:
    """Slots and bytes of all placed adapters. Used by the engine's thread, between steps."""

    def __init__(self, scheduler: Scheduler, runner: Runner, budget: int | None) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._budget = budget
        self._free: list[int] = []
        self._next = 1
        self.bytes = 0
        """Held by adapters now, with the caches they share."""
        self._caches: Counter[SideCache] = Counter()
        """How many placed adapters hold each."""

    def place(self, name: str, adapter: PreparedAdapter) -> Placed:
        """All or nothing. AdapterMemoryExhausted where the budget or the KV cache has no room for it.

        Rows may use it when the last of `chunks` is computed.
        """
        needed = adapter.size + sum(cache.nbytes for cache in adapter.caches if not self._caches[cache])
        if self._budget is not None and self.bytes + needed > self._budget:
            raise AdapterMemoryExhausted(
                f"adapter {name!r} needs {needed} bytes: expected at most {self._budget - self.bytes} of the "
                f"adapter memory's {self._budget}, the rest is held by other adapters"
            )
        adapter.upload.wait(adapter.tensors())
        parts = adapter.lowered.parts
        with ExitStack() as undo:
            prefixes = self._place_prefixes(name, adapter, undo)
            slot = self._fill_sites(adapter, undo)
            undo.pop_all()
        self.bytes += needed
        self._caches.update(adapter.caches)
        first_position = 0
        if parts.prefix is not None:
            first_position = parts.prefix.first_position
        elif parts.virtual is not None:
            first_position = parts.virtual.length
        head = parts.head
        return Placed(
            slot=slot,
            prefixes=prefixes,
            first_position=first_position,
            salt=adapter.salt,
            invocation=adapter.lowered.invocation,
            size=adapter.size,
            sites=tuple(site for site, _ in adapter.sites),
            readout=None if head is None else _READOUTS[head.kind],
            labels=() if head is None else head.labels,
            reads_padding=head is not None and head.reads_padding,
            tasks=parts.virtual.tasks if parts.virtual else 0,
            images=_image_rule(adapter.lowered),
            template=parts.template,
            caches=adapter.caches,
            obstacle=obstacle(adapter.lowered),
        )

    def _fill_sites(self, adapter: PreparedAdapter, undo: ExitStack) -> int:
        """Every site has the adapter in the slot that is returned."""
        slot = self._free.pop() if self._free else self._next
        self._next = max(self._next, slot + 1)
        undo.callback(self._free.append, slot)
        for site, prepared in adapter.sites:
            undo.callback(site.drop, slot)
            site.put(slot, prepared)
        self._runner.placed(slot, [site for site, _ in adapter.sites])
        return slot

    def _place_prefixes(self, name: str, adapter: PreparedAdapter, undo: ExitStack) -> tuple[PrefixBlocks, ...]:
        """Blocks for all that stands before rows. Stored keys and values are written, virtual tokens are not yet."""
        stored, virtual = adapter.stored, adapter.virtual
        lengths = [] if virtual is None else [len(prompt) for prompt in virtual]
        if stored is not None:
            lengths = [stored.length]
        placed: list[PrefixBlocks] = []
        for length in lengths:
            placed.append(self._scheduler.allocate_prefix(length, name))
            undo.callback(self._scheduler.free_prefix, placed[-1])
        if stored is not None:
            self._runner.cache.write_prefix(placed[0].blocks, stored)
        return tuple(placed)

    def chunks(self, placed: Placed, adapter: PreparedAdapter) -> Iterator[Chunk]:
        """The work of computing the virtual tokens' keys and values, each no more than a step may be."""
        if adapter.virtual is not None:
            yield from chunks(placed.slot, placed.prefixes, adapter.virtual, self._scheduler)

    def compute(self, chunk: Chunk) -> None:
        self._runner.compute(chunk.rows, chunk.embeddings)

    def remove(self, placed: Placed) -> None:
        """The last row that used it has ended."""
        for site in placed.sites:
            site.drop(placed.slot)
        self._runner.removed(placed.slot, placed.sites)
        for prefix in placed.prefixes:
            self._scheduler.free_prefix(prefix)
        self._free.append(placed.slot)
        self._caches -= Counter(placed.caches)
        self.bytes -= placed.size + sum(cache.nbytes for cache in placed.caches if cache not in self._caches)
