"""Which tokens of a flat batch belong to which adapter."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from peftmux.kernels.lowrank.tiles import TileBuffer, Tiles, tiles_of


@dataclass(frozen=True, eq=False)
class Segments:
    """The adapters of one step, built once and read by every linear site. Slot 0 is the base model: never touched."""

    runs: tuple[tuple[int, int, int], ...]
    """(slot, start, end) in tokens of the flat batch, slot > 0, in batch order; neighbours of one slot are one run."""
    num_tokens: int
    """Tokens of all rows, the base model's included; tokens from here on are padding."""
    device: torch.device
    threads: int
    """How many threads torch gives the thread that built this."""
    buffer: TileBuffer | None = None
    """Where a CUDA graph reads the adapters of the step that it replays; None for a step that runs as it is built."""
    _tokens: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def build(cls, slots: Sequence[int], lens: Sequence[int], device: torch.device | str = "cpu") -> Segments:
        """The adapter slot and the number of tokens of each row, in flat-batch order."""
        if len(slots) != len(lens):
            raise ValueError(f"expected one length for each of {len(slots)} rows, got {len(lens)}")
        runs: list[tuple[int, int, int]] = []
        start = 0
        for slot, count in zip(slots, lens, strict=True):
            if slot < 0 or count < 0:
                raise ValueError(f"expected slots and lengths of at least 0, got slot {slot} of length {count}")
            end = start + count
            if slot and count:
                joined = bool(runs) and runs[-1][0] == slot and runs[-1][2] == start
                first = runs.pop()[1] if joined else start
                runs.append((slot, first, end))
            start = end
        return cls(tuple(runs), start, torch.device(device), torch.get_num_threads())

    @classmethod
    def over(cls, buffer: TileBuffer, device: torch.device | str) -> Segments:
        """For capturing a CUDA graph: whatever `buffer` holds at replay, also at sites that have no adapter yet.

        Only forms of operators that read `tiles` can be captured: `runs` is empty.
        """
        return cls((), buffer.tokens, torch.device(device), torch.get_num_threads(), buffer)

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """The adapters in this step, each once, ascending."""
        return tuple(sorted({slot for slot, _, _ in self.runs}))

    @cached_property
    def by_slot(self) -> Tensor:
        """The runs sorted by slot, [runs, 3] int32 on the CPU."""
        return torch.tensor(sorted(self.runs), dtype=torch.int32)

    @cached_property
    def slot_of_token(self) -> Tensor:
        """[num_tokens] int64 on the device."""
        owner = torch.zeros(self.num_tokens, dtype=torch.int64)
        for slot, start, end in self.runs:
            owner[start:end] = slot
        return owner.to(self.device)

    def tokens_of(self, slots: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The tokens of these adapters, and the slot of each: [t], [t] int64 on the device, in batch order."""
        if slots not in self._tokens:
            runs = [run for run in self.runs if run[0] in slots]
            tokens = [token for _, start, end in runs for token in range(start, end)]
            owners = [slot for slot, start, end in runs for _ in range(start, end)]
            both = torch.tensor([tokens, owners], dtype=torch.int64)
            if self.device.type == "cuda":
                both = both.pin_memory()
            of_batch, of_slot = both.to(self.device, non_blocking=True)
            self._tokens[slots] = (of_batch, of_slot)
        return self._tokens[slots]

    @cached_property
    def tiles(self) -> Tiles:
        """The tokens grouped by adapter, on the device."""
        return self.buffer.tiles if self.buffer else tiles_of(self)

    @property
    def token_slots(self) -> Tensor:
        """[num_tokens] int32 on the device: each token's slot, for kernels that take one token a program."""
        return self.tiles.owners

    def touches(self, held: Container[int]) -> bool:
        """Must what these slots hold be applied? Of a step that is captured nobody knows what it is replayed for."""
        return self.buffer is not None or any(slot in held for slot, _, _ in self.runs)
