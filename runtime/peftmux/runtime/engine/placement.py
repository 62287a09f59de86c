"""Adapters on the device: a slot in every site they change, and cache blocks for a prefix."""

from __future__ import annotations

from dataclasses import dataclass

from peftmux.adapters.parts import KVPrefix, LoweredAdapter
from peftmux.kernels.lowrank import LowRankSite, Prepared
from peftmux.runtime.errors import AdapterMemoryExhausted
from peftmux.runtime.model.cache import PagedCache, block_bytes
from peftmux.runtime.model.load import LoadedModel
from peftmux.runtime.model.sites import SiteGroup
from peftmux.runtime.scheduler import PrefixBlocks, Scheduler


@dataclass(frozen=True, slots=True, eq=False)
class PreparedAdapter:
    """Laid out for the device, not yet in it: what a loader thread hands to the engine's thread."""

    lowered: LoweredAdapter
    sites: tuple[tuple[LowRankSite, Prepared], ...]
    prefix: KVPrefix | None
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
    size: int
    """Bytes on the device."""
    sites: tuple[LowRankSite, ...]

    @property
    def position_offset(self) -> int:
        return self.first_position - (self.prefix.length if self.prefix else 0)


BASE = Placed(slot=0, prefix=None, first_position=0, salt=b"", size=0, sites=())
"""The base model: nothing on top."""


def prepare(model: LoadedModel, lowered: LoweredAdapter, block_size: int) -> PreparedAdapter:
    """Cast and lay out an adapter's parts. Safe in a loader thread: touches nothing that a step reads."""
    by_group: dict[SiteGroup, list[str | None]] = {}
    for name in lowered.linear:
        ref = model.sites[name]
        by_group.setdefault(ref.group, [None] * len(ref.group.sites))[ref.index] = name
    sites = []
    size = 0
    for group, names in by_group.items():
        prepared = group.lowrank.prepare([None if n is None else lowered.linear[n] for n in names])
        sites.append((group.lowrank, prepared))
        size += prepared.nbytes
    if lowered.prefix is not None:
        blocks = -(-lowered.prefix.length // block_size)
        size += blocks * block_bytes(model.kv_shapes, block_size, model.dtype)
    return PreparedAdapter(lowered, tuple(sites), lowered.prefix, _salt(model, lowered), size)


def _salt(model: LoadedModel, lowered: LoweredAdapter) -> bytes:
    """An adapter of the output projection alone shares the base model's keys and values."""
    touches = lowered.prefix is not None or any(not model.is_head(name) for name in lowered.linear)
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
        blocks = None
        if adapter.prefix is not None:
            blocks = self._scheduler.allocate_prefix(adapter.prefix.length, name)
            self._cache.write_prefix(blocks.blocks, adapter.prefix)
        slot = self._free.pop() if self._free else self._next
        self._next = max(self._next, slot + 1)
        for site, prepared in adapter.sites:
            site.put(slot, prepared)
        self.bytes += adapter.size
        first = adapter.prefix.first_position if adapter.prefix else 0
        return Placed(slot, blocks, first, adapter.salt, adapter.size, tuple(site for site, _ in adapter.sites))

    def remove(self, placed: Placed) -> None:
        """The last row that used it has ended."""
        for site in placed.sites:
            site.drop(placed.slot)
        if placed.prefix is not None:
            self._scheduler.free_prefix(placed.prefix)
        self._free.append(placed.slot)
        self.bytes -= placed.size
