"""Numbers on their way to the device and back: on a GPU, copies from and to pinned memory that nobody waits for.

Pinned memory comes from torch's caching allocator, which hands a block out again only when the copy that used it is
done: the numbers of step n + 1 can be written while those of step n are still being copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNED = 2
"""int64 values: what is handed out begins at a multiple of 16 bytes, as memory of its own would."""


def to_device(lists: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """One int64 tensor for each list; on a GPU all of them are parts of one copy."""
    if device.type == "cpu":
        return [torch.tensor(values, dtype=torch.int64) for values in lists]
    sizes = [len(values) for values in lists]
    return pieces(packed(lists, device).to(device, non_blocking=True), sizes)


def on_device(values: Sequence[Any] | NDArray[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.tensor`, which on a GPU would wait for everything that has been launched."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def packed(lists: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """The lists one after the other, each begun at a multiple of 16 bytes, on the host: pinned for a GPU."""
    starts, total = _starts([len(values) for values in lists])
    host = torch.zeros(total, dtype=torch.int64, pin_memory=device.type == "cuda")
    into = host.numpy()
    for start, values in zip(starts, lists, strict=True):
        into[start : start + len(values)] = values
    return host


def pieces(whole: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Views of `whole`, laid out as `packed` lays out lists of these sizes."""
    starts, _ = _starts(sizes)
    return [whole[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def room(sizes: Sequence[int]) -> int:
    """int64 values that `packed` needs for lists of these sizes."""
    return _starts(sizes)[1]


def _starts(sizes: Sequence[int]) -> tuple[list[int], int]:
    starts, at = [], 0
    for size in sizes:
        starts.append(at)
        at += -(-size // _ALIGNED) * _ALIGNED
    return starts, at


class Readback:
    """A small tensor's values, on their way to the host from the moment this is made."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._done: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def tolist(self) -> list[Any]:
        """Waits for the copy, and for nothing that was launched after it."""
        if self._done is not None:
            self._done.synchronize()
        return list(self._values.tolist())
