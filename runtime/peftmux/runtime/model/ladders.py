"""Side networks beside the base: they climb with a step's forward, over the tokens of their own rows alone.

Their keys and values lie in caches of their own, block for block beside the served one, under the rows' block tables.
A cache serves every ladder of its shape (rows never share blocks across adapters), is counted once in the adapter
memory, and ends with the last of them. What the prefix cache knows to lie in it is named by it, so never found again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from peftmux.adapters.stream import decoders, stream_in, stream_out
from peftmux.kernels.attention import AttentionPath, AttentionRows, choose_attention
from peftmux.kernels.ladder import Ladder, climb, finish, rotation, start
from peftmux.kernels.placed import placed
from peftmux.kernels.tree import mapped, tensors
from peftmux.runtime.errors import AdapterMemoryExhausted
from peftmux.runtime.model.staging import to_device
from peftmux.runtime.model.step import SlotRows, StepState
from peftmux.runtime.scheduler.plan import RowPlan

_NAMES = count()


class SideCache:
    """Keys and values of every rung, each [blocks, block size, heads, head dim]."""

    def __init__(self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        """shape: (rungs, blocks, block size, key heads, head dim). AdapterMemoryExhausted where there is no room."""
        rungs, *one = shape
        try:
            made = [torch.zeros(one, dtype=dtype, device=device) for _ in range(2 * rungs)]
        except RuntimeError as error:
            needed = 2 * rungs * math.prod(one) * dtype.itemsize
            raise AdapterMemoryExhausted(
                f"no room for the {needed} bytes of a side network's cache of keys and values, which has a block for "
                f"each of the served cache's {one[0]}: a smaller --kv-cache-memory makes both smaller"
            ) from error
        self.layers = list(zip(made[::2], made[1::2], strict=True))
        self.name = b"ladder" + next(_NAMES).to_bytes(8)

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.layers)


@dataclass(frozen=True, slots=True, eq=False)
class PreparedLadder:
    """A ladder on its device, in the base's dtype, with the cache it shares."""

    ladder: Ladder
    cache: SideCache

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in tensors(self.ladder))


@dataclass(slots=True)
class _Climb:
    """One ladder in the running step."""

    ladder: Ladder
    cache: SideCache
    rows: SlotRows
    path: AttentionPath
    turn: tuple[Tensor, Tensor]
    side: Tensor
    done: int = 0
    """Rungs."""

    def step(self, layer: int, h: Tensor) -> None:
        """h: [T, D], what the base's layer gives all tokens."""
        rungs = self.ladder.rungs
        if self.done < len(rungs) and rungs[self.done].layer == layer:
            own = h.index_select(0, self.rows.tokens)
            self.side = climb(self.side, own, rungs[self.done], self.ladder, self.turn, self._attend)
            self.done += 1

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k_cache, v_cache = self.cache.layers[self.done]
        self.path.write_kv(k, v, k_cache, v_cache, self.rows.slots)
        return self.path.attend(q, k_cache, v_cache, self.rows.rows, scale=q.shape[-1] ** -0.5)


class Ladders:
    """The resident side networks. `prepare` may run in any thread, the rest in the one that runs steps.

    The base's layers are watched only while there are any.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[str], step: StepState) -> None:
        self._device, self._dtype = model.device, model.dtype
        self._layers = [model.get_submodule(path) for path in layers]
        self._ends = decoders(model)
        self._step = step
        self._path = choose_attention(model.device, model.dtype)
        self._held: dict[int, PreparedLadder] = {}
        self._running: list[_Climb] = []
        self._watches: list[RemovableHandle] = []
        self._blocks = (0, 0)
        self._making = threading.Lock()
        self._caches: WeakValueDictionary[tuple[int, ...], SideCache] = WeakValueDictionary()

    @property
    def empty(self) -> bool:
        return not self._held

    def bind(self, num_blocks: int, block_size: int) -> None:
        """The served cache's measures."""
        self._blocks = (num_blocks, block_size)

    def prepare(self, part: Ladder) -> PreparedLadder:
        """ValueError for values that are not finite in the base's dtype."""
        there = mapped(part, lambda tensor: placed(tensor, self._device, self._dtype, "a ladder"))
        shape = (len(part.rungs), *self._blocks, part.kv_heads, part.head_dim)
        with self._making:
            cache = self._caches.get(shape)
            if cache is None:
                cache = self._caches[shape] = SideCache(shape, self._dtype, self._device)
        return PreparedLadder(there, cache)

    def put(self, slot: int, prepared: PreparedLadder) -> None:
        if not self._held:
            self._watch()
        self._held[slot] = prepared

    def drop(self, slot: int) -> None:
        self._held.pop(slot, None)
        if not self._held:
            for watch in self._watches:
                watch.remove()
            self._watches.clear()
            self._running.clear()

    def rows(self, rows: Sequence[RowPlan], positions: Sequence[int], slots: Sequence[int]) -> dict[int, SlotRows]:
        """By slot of a ladder that has rows. positions, slots: of the step's tokens, row by row."""
        of: dict[int, list[tuple[RowPlan, int]]] = {}
        first = 0
        for row in rows:
            if row.slot in self._held:
                of.setdefault(row.slot, []).append((row, first))
            first += len(row.tokens)
        return {slot: self._slot_rows(own, positions, slots) for slot, own in of.items()}

    def _slot_rows(
        self, own: Sequence[tuple[RowPlan, int]], positions: Sequence[int], slots: Sequence[int]
    ) -> SlotRows:
        tokens = [at for row, first in own for at in range(first, first + len(row.tokens))]
        rows = AttentionRows.build(
            [len(row.tokens) for row, _ in own],
            [row.start + len(row.tokens) for row, _ in own],
            [row.blocks for row, _ in own],
            self._device,
        )
        lists = [tokens, [positions[at] for at in tokens], [slots[at] for at in tokens]]
        staged = to_device(lists, self._device)
        return SlotRows(tokens=staged[0], positions=staged[1], slots=staged[2], rows=rows)

    def _watch(self) -> None:
        self._watches.append(self._layers[0].register_forward_pre_hook(self._begin, with_kwargs=True))
        for index, layer in enumerate(self._layers):
            self._watches.append(layer.register_forward_hook(self._after(index)))
        self._watches += [end.register_forward_hook(self._end) for end in self._ends]

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        h = stream_in(args, kwargs)
        assert h is not None, "a decoder layer was called otherwise than when it was loaded"
        self._running = []
        for slot, rows in self._step.inputs.ladders.items():
            held = self._held[slot]
            side = start(_flat(h).index_select(0, rows.tokens), held.ladder)
            turn = rotation(rows.positions, held.ladder)
            self._running.append(_Climb(held.ladder, held.cache, rows, self._path, turn, side))

    def _after(self, layer: int) -> Any:
        def watch(module: Any, args: Any, output: Any) -> None:
            if self._running:
                h = stream_out(output)
                assert h is not None, "a decoder layer gives something else than when it was loaded"
                for one in self._running:
                    one.step(layer, _flat(h))

        return watch

    def _end(self, module: Any, args: Any, output: Any) -> None:
        """In place, before or after whoever reads these states. Of nested decoders the inner one comes first."""
        states: Tensor = output[0]
        for one in self._running:
            flat = _flat(states)
            tokens = one.rows.tokens
            flat[tokens] = finish(one.side, flat.index_select(0, tokens), one.ladder)
        self._running = []


def _flat(h: Tensor) -> Tensor:
    return h.view(-1, h.shape[-1])
