"""Where each slot's vectors and matrices lie on the device.

A kernel reads a token's slot, then the slot's record, then what the record points at. So adapters come and go by
writing one record, and a captured CUDA graph goes on serving: it holds the table's address, never an adapter's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftmux.kernels.lowrank.workspace import workspace

CAPACITY = 256
"""Slots of a new table."""
_ALIGNMENT = 16
"""Bytes: kernels read whole vectors from an address on."""


class SlotTable:
    """Records of `width` int64 values, zero where a slot has none. Belongs to the thread that runs the model.

    The table is made when its first record is, keeps its place while slots stay below its capacity, and owns what its
    records point at; where it is made or moves, the workspace's `generation` rises. It is written in the order of the
    current stream, so steps already queued see the old record, and what a record pointed at outlives them.
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

    @torch.inference_mode()
    def put(self, slot: int, *values: Tensor | int) -> None:
        """A contiguous tensor stands for its address, which is a multiple of 16 bytes: copied where it is not."""
        assert slot > 0, "slot 0 is the base model's"
        assert len(values) == self._width, f"expected {self._width} values, got {len(values)}"
        placed = tuple(_placed(value) for value in values)
        self._reserve(slot)
        self._write(slot, [v if isinstance(v, int) else v.data_ptr() for v in placed])
        self._held[slot] = placed

    @torch.inference_mode()
    def drop(self, slot: int) -> None:
        held = self._held.pop(slot, None)
        if held is None:
            return
        self._write(slot, [0] * self._width)
        for value in held:
            if isinstance(value, Tensor) and value.is_cuda:
                value.record_stream(torch.cuda.current_stream(value.device))

    def _write(self, slot: int, values: list[int]) -> None:
        record = torch.tensor(values, dtype=torch.int64)
        if self._device.type == "cuda":
            record = record.pin_memory()
        self.tensor[slot].copy_(record, non_blocking=True)

    def _reserve(self, slot: int) -> None:
        old = self._rows
        if old is not None and slot < len(old):
            return
        capacity = CAPACITY if old is None else len(old)
        while capacity <= slot:
            capacity *= 2
        self._rows = torch.zeros(capacity, self._width, dtype=torch.int64, device=self._device)
        if old is not None:
            self._rows[: len(old)] = old
        workspace(self._device).moved()


def _placed(value: Tensor | int) -> Tensor | int:
    if isinstance(value, int):
        return value
    assert value.is_contiguous(), "a record points at contiguous memory"
    return value.clone() if value.data_ptr() % _ALIGNMENT else value
