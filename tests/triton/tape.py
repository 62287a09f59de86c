"""A CUDA graph without CUDA: what a forward does to tensors, recorded once and done again, in the same memory.

What the host decides is decided when it is recorded, and whatever would make the host wait for the device is refused,
as a capture refuses it. So what a replay gives follows from the contents of the inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

_WAITS = {"aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.lift_fresh", "aten._unique2"}
"""lift_fresh: `torch.tensor` of numbers, which are copied from memory that is not pinned."""


class _Tape(TorchDispatchMode):
    """Records torch's operators and Triton's launches."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._inside = False
        """An operator that is recorded as a whole."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removesuffix(f".{func._overloadname}")
        if name in _WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        self._inside = True
        try:
            out = func(*args, **(kwargs or {}))
        finally:
            self._inside = False
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @contextmanager
    def recording(self) -> Iterator[None]:
        launch = GridExecutor.__call__
        tape = self

        def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
            if tape._inside:
                launch(self, *args, **kwargs)
                return
            with _disable_current_modes():
                launch(self, *args, **kwargs)
            tape.calls.append((lambda *a, **k: launch(self, *a, **k), args, kwargs, None))

        GridExecutor.__call__ = recorded
        try:
            with self:
                yield
        finally:
            GridExecutor.__call__ = launch


class TapeCapture:
    """A `peftmux.runtime.model.graphs.Capture`. `replays` counts."""

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0

    def __call__(self, forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        forward()
        tape = _Tape()
        with tape.recording():
            logits = forward()
        self.captures += 1

        def replay() -> Tensor:
            self.replays += 1
            logits.fill_(torch.nan)
            for func, args, kwargs, out in tape.calls:
                again = func(*args, **kwargs)
                for old, new in zip(pytree.tree_leaves(out), pytree.tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
            return logits

        return replay
