"""What a run draws from, kept aside while others draw."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_Torch = tuple[Tensor, list[Tensor]]


class RandomState:
    """The process's random state as it was when this was made, and as it has become within `all` and `torch`."""

    def __init__(self) -> None:
        self._others = _others()
        self._torch = _torch()

    @contextmanager
    def all(self) -> Iterator[None]:
        """Within it Python, numpy and torch draw from here."""
        outside = _others()
        _set_others(self._others)
        try:
            with self.torch():
                yield
        finally:
            self._others = _others()
            _set_others(outside)

    @contextmanager
    def torch(self) -> Iterator[None]:
        """Within it torch draws from here."""
        outside = _torch()
        _set_torch(self._torch)
        try:
            yield
        finally:
            self._torch = _torch()
            _set_torch(outside)

    @contextmanager
    def restored_on(self, error: type[Exception]) -> Iterator[None]:
        """What was drawn from here before such an error will be drawn again."""
        before = self._others, self._torch
        try:
            yield
        except error:
            self._others, self._torch = before
            raise

    def draws_as(self, other: RandomState) -> bool:
        """Whether torch would draw the same from both."""
        (cpu, devices), (cpu_too, devices_too) = self._torch, other._torch
        return torch.equal(cpu, cpu_too) and all(map(torch.equal, devices, devices_too))


@dataclass(slots=True)
class Draws:
    """What one adapter's changes draw in a pass with other adapters' rows: what they would in a pass of its own.

    tokens: of its longest row; what follows in the pass is filling. scored: its last tokens, which need logits.
    """

    state: RandomState
    tokens: int
    scored: int

    def apply(self, function: Callable[..., Tensor], rows: int, width: int, *tensors: Tensor) -> Tensor:
        """`function` of its own tokens; where there is filling it is as in the first of `tensors`.

        tensors: [rows, width, ...], [rows * width, ...], or of the last positions alone, [rows, fewer, ...].
        """
        flat = len(tensors[0]) != rows
        grids = [t.unflatten(0, (rows, width)) if flat else t for t in tensors]
        first, found = grids[0], grids[0].shape[1]
        own = self._own(found, width)
        given = [grid[:, own] for grid in grids]
        with self.state.torch():
            new = function(*[grid.flatten(0, 1) for grid in given] if flat else given)
        if own == slice(0, found):
            return new
        new = new.unflatten(0, (rows, -1)) if flat else new
        whole = torch.cat([first[:, : own.start], new, first[:, own.stop :]], 1)
        return whole.flatten(0, 1) if flat else whole

    def _own(self, found: int, width: int) -> slice:
        """Its own tokens among `found`: all `width` of the pass, or the last of them, which get logits."""
        skipped = width - found
        first = self.tokens - self.scored if skipped else 0
        return slice(max(first - skipped, 0), self.tokens - skipped)


def _others() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()


def _set_others(state: tuple[Any, Any]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])


def _torch() -> _Torch:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_torch(state: _Torch) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
