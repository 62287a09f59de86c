"""Adapters on the device: a slot in every site they change, and cache blocks for a prefix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.parts import LoweredAdapter
from peftmux.runtime.errors import AdapterMemoryExhausted
from peftmux.runtime.model.cache import PagedCache, block_bytes
from peftmux.runtime.model.loaded import LoadedModel
from peftmux.runtime.model.sites import Site, SiteGroup
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


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """An adapter on the device. Owned by its revision in the store."""

    slot: int
    prefix: PrefixBlocks | None
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
    tasks: int = 0
    """Of a multi-task adapter; 0 for any other."""

    @property
    def position_offset(self) -> int:
        return self.first_position - (self.prefix.length if self.prefix else 0)


BASE = Placed(slot=0, prefix=None, first_position=0, salt=b"", invocation=(), size=0, sites=())
"""The base model: nothing on top."""


def prepare(model: LoadedModel, lowered: LoweredAdapter, block_size: int) -> PreparedAdapter:
    """Cast and lay out an adapter's parts. Safe in a loader thread: touches nothing that a step reads.

    AdapterInvalid for values that overflow the base's dtype, and for a prefix that leaves no room for a prompt.
    """
    prefix = lowered.parts.prefix
    if prefix is not None and prefix.length >= model.context_length - 1:
        raise AdapterInvalid(
            Reason.TOO_LARGE,
            f"expected at most {model.context_length - 2} virtual tokens in a context of {model.context_length}, "
            f"got {prefix.length}",
        )
    try:
        sites = _prepare_sites(model, lowered)
    except ValueError as error:
        raise AdapterInvalid(Reason.NOT_FINITE, f"in {model.dtype}: {error}") from error
    size = sum(prepared.nbytes for _, prepared in sites)
    if prefix is not None:
        size += -(-prefix.length // block_size) * block_bytes(model.kv_shapes, block_size, model.dtype)
    return PreparedAdapter(lowered, sites, _salt(model, lowered), size)


def _prepare_sites(model: LoadedModel, lowered: LoweredAdapter) -> tuple[tuple[Site, Any], ...]:
    sites: list[tuple[Site, Any]] = []
    linear = lowered.parts.linear
    for group, names in _by_group(model, lowered).items():
        sites.append((group.lowrank, group.lowrank.prepare([None if n is None else linear[n] for n in names])))
    for name, parts in lowered.parts.others.items():
        for part in parts:
            site = model.places[type(part), name]
            sites.append((site, site.prepare(part)))
    if lowered.parts.head is not None:
        sites.append((model.heads, model.heads.prepare(lowered.parts.head)))
    return tuple(sites)


def _by_group(model: LoadedModel, lowered: LoweredAdapter) -> dict[SiteGroup, list[str | None]]:
    """The adapter's linear sites by the product they share, in the order of its slices."""
    groups: dict[SiteGroup, list[str | None]] = {}
    for name in lowered.parts.linear:
        ref = model.sites[name]
        groups.setdefault(ref.group, [None] * len(ref.group.sites))[ref.index] = name
    return groups


def _salt(model: LoadedModel, lowered: LoweredAdapter) -> bytes:
    """An adapter of the output projection alone shares the base model's keys and values."""
    touches = bool(lowered.parts.places - {model.head}) or lowered.parts.prefix is not None
    return bytes.fromhex(lowered.digest) if touches else b""


class DevicePlacement:
    """Slots and bytes of all placed adapters. Used by the engine's thread, between steps."""

    def __init__(self, scheduler: Scheduler, cache: PagedCache, budget: int | None) -> None:
        self._scheduler = scheduler
        self._cache = cache
        self._budget = budget
        self._free: list[int] = []
        self._next = 1
        self.bytes = 0
        """Held by adapters now."""

    def place(self, name: str, adapter: PreparedAdapter) -> Placed:
        """All or nothing. AdapterMemoryExhausted where the budget or the KV cache has no room for it."""
        if self._budget is not None and self.bytes + adapter.size > self._budget:
            raise AdapterMemoryExhausted(
                f"adapter {name!r} needs {adapter.size} bytes: expected at most {self._budget - self.bytes} of the "
                f"adapter memory's {self._budget}, the rest is held by other adapters"
            )
        blocks, prefix = None, adapter.lowered.parts.prefix
        if prefix is not None:
            blocks = self._scheduler.allocate_prefix(prefix.length, name)
            self._cache.write_prefix(blocks.blocks, prefix)
        head = adapter.lowered.parts.head
        slot = self._free.pop() if self._free else self._next
        self._next = max(self._next, slot + 1)
        for site, prepared in adapter.sites:
            site.put(slot, prepared)
        self.bytes += adapter.size
        return Placed(
            slot=slot,
            prefix=blocks,
            first_position=prefix.first_position if prefix else 0,
            salt=adapter.salt,
            invocation=adapter.lowered.invocation,
            size=adapter.size,
            sites=tuple(site for site, _ in adapter.sites),
            readout=None if head is None else _READOUTS[head.kind],
            labels=() if head is None else head.labels,
        )

    def remove(self, placed: Placed) -> None:
        """The last row that used it has ended."""
        for site in placed.sites:
            site.drop(placed.slot)
        if placed.prefix is not None:
            self._scheduler.free_prefix(placed.prefix)
        self._free.append(placed.slot)
        self.bytes -= placed.size
