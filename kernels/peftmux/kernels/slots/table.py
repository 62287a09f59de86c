"""Where each slot's vectors and matrices lie on the device.

A kernel reads a token's slot, then the slot's record, then what the record points at. So adapters come and go by
writing one record, and a captured CUDA graph goes on serving: it holds the table's address, never an adapter's.
"""

from __future__ import annotations

from itertools import count

import torch
from torch import Tensor

CAPACITY = 1024
"""Slots of a new table."""

_versions = count(1)
_version = 0


def layout_version() -> int:
    """Grows whenever some table is made or moved: a graph captured at another version must be captured anew."""
    return _version


class SlotTable:
    """Records of `width` int64 values, zero where a slot has none. Belongs to the thread that runs the model.

    The table is made when its first record is, keeps its place while slots stay below its capacity, and owns what its
    records point at. It is written in the order of the current stream, so steps already queued see the old record.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._width = width
        self._device = device
        self._held: dict[int, tuple[Tensor | int, ...]] = {}
        self._rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self._held)

    @property
    def tensor(self) -> Tensor:
        """[capacity, width] int64 on the device. There must have been a record."""
        assert self._rows is not None, "an empty table has no rows"
        return self._rows

    def put(self, slot: int, *values: Tensor | int) -> None:
        """A tensor stands for its address and is kept alive; it must be contiguous."""
        assert slot > 0, "slot 0 is the base model's"
        assert len(values) == self._width, f"expected {self._width} values, got {len(values)}"
        self._reserve(slot)
        self._held[slot] = values
        self._write(slot, [v if isinstance(v, int) else v.data_ptr() for v in values])

    def drop(self, slot: int) -> None:
        if self._held.pop(slot, None) is not None:
            self._write(slot, [0] * self._width)

    def _write(self, slot: int, values: list[int]) -> None:
        record = torch.tensor(values, dtype=torch.int64)
        if self._device.type == "cuda":
            record = record.pin_memory()
        self.tensor[slot].copy_(record, non_blocking=True)

    def _reserve(self, slot: int) -> None:
        global _version
        old = self._rows
        if old is not None and slot < len(old):
            return
        capacity = CAPACITY if old is None else len(old)
        while capacity <= slot:
            capacity *= 2
        self._rows = torch.zeros(capacity, self._width, dtype=torch.int64, device=self._device)
        if old is not None:
            self._rows[: len(old)] = old
        _version = next(_versions)
