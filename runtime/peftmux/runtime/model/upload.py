"""Adapters on their way to a GPU, beside the steps: from pinned memory, on a stream of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterable
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

    Steps run on another stream meanwhile; whoever uses the result there calls `wait` first, with all of its tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream(device) if device.type == "cuda" else None
        self._block = torch.cuda.stream(self._stream) if self._stream else nullcontext()
        self._before: torch.cuda.Stream | None = None
        """The stream outside the block."""
        self._done: torch.cuda.Event | None = None

    def __enter__(self) -> Upload:
        if self._stream is not None:
            self._before = torch.cuda.current_stream(self._device)
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
        """The part with its tensors on the device; its own where they are there already, made on the stream outside
        the block."""
        return part if self._stream is None else mapped(part, self._move)

    def _move(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        assert self._stream is not None, "without a stream nothing is moved"
        assert self._before is not None, "parts are moved inside the block"
        self._stream.wait_stream(self._before)
        tensor.record_stream(self._stream)
        return tensor

    def wait(self, made: Iterable[Tensor]) -> None:
        """What the calling thread launches from now on comes after the upload. The thread itself does not wait.

        The memory of what was `made` belongs to the upload's stream, where the next upload would take it as soon as
        nothing holds it here. So the current stream is recorded as its user: it is reused only when all that was
        launched here before it was let go is done.
        """
        if self._done is None:
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._done)
        for tensor in made:
            for stored in dense(tensor):
                if stored.is_cuda:
                    stored.record_stream(current)


def dense(tensor: Tensor) -> tuple[Tensor, ...]:
    """What has memory of its own: the tensor, or the pieces of one in compressed rows."""
    if tensor.layout is not torch.sparse_csr:
        return (tensor,)
    return tensor.crow_indices(), tensor.col_indices(), tensor.values()
