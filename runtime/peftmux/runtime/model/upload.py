"""Adapters on their way to a GPU, beside the steps: from pinned memory, on a stream of their own."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from peftmux.kernels.tree import mapped

P = TypeVar("P")

_streams: dict[torch.device, torch.cuda.Stream] = {}
_making = threading.Lock()


def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one for uploads to this device: what one adapter gives back there, the next can take."""
    with _making:
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(device)
        return _streams[device]


class Upload:
    """A block in which one adapter is laid out on the device, in a loader thread. On the CPU it does nothing.

    Steps run on another stream meanwhile; whoever uses the result there calls `wait` first.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream(device) if device.type == "cuda" else None
        self._block = torch.cuda.stream(self._stream) if self._stream else nullcontext()
        self._done: torch.cuda.Event | None = None

    def __enter__(self) -> Upload:
        self._block.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._done = torch.cuda.Event()
            self._done.record(self._stream)
        self._block.__exit__(kind, error, trace)

    def move(self, part: P) -> P:
        """The part with its tensors on the device; its own where they are there already."""
        return part if self._stream is None else mapped(part, self._move)

    def _move(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def wait(self) -> None:
        """What the calling thread launches from now on comes after the upload. The thread itself does not wait."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)
