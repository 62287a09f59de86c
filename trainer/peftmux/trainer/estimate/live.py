"""The bytes of all tensors that are alive, after each operation of a training step."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import TrainerCallback


class LiveBytes(TorchDispatchMode):
    """Counts storages that come out of operations, and those given to `hold`, until they are freed.

    What an operation allocates for itself while it runs is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held: dict[int, Any] = {}
        self._bytes = 0
        self._line: list[int] | None = None

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Count these too. Returns their bytes, as far as they were not counted yet."""
        before = self._bytes
        for tensor in tensors:
            self._add(tensor)
        return self._bytes - before

    def begin(self) -> None:
        self._line = []

    def end(self) -> list[int]:
        """Bytes after each operation since `begin`."""
        line, self._line = self._line, None
        return line or []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._add(value)
        if self._line is not None:
            self._line.append(self._bytes)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._held:
            size = storage.nbytes()
            self._held[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self._bytes += size

    def _gone(self, key: int, size: int) -> None:
        self._held.pop(key, None)
        self._bytes -= size


class StepWatch(TrainerCallback):
    """Keeps the last optimiser step's bytes and its seconds."""

    def __init__(self, live: LiveBytes) -> None:
        self._live = live
        self._started = 0.0
        self._line: list[int] = []
        self.seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()
        self._live.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._line = self._live.end()
        self.seconds = time.perf_counter() - self._started

    def take(self) -> list[int]:
        """The bytes, which are not kept: they are a lot of numbers."""
        line, self._line = self._line, []
        return line
