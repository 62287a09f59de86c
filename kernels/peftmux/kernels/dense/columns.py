"""Some outputs of a layer whose form only computes all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from peftmux.kernels.dense.launch import Dense


class Columns:
    """Outputs start .. stop - 1 of `whole`, cut out of its results."""

    def __init__(self, whole: Dense, start: int, stop: int) -> None:
        self._whole = whole
        self._start = start
        self._stop = stop

    def __call__(self, x: Tensor) -> Tensor:
        return self._whole(x)[..., self._start : self._stop]

    def weight(self) -> Tensor:
        return self._whole.weight()[self._start : self._stop]

    def columns(self, start: int, stop: int) -> Columns:
        return Columns(self._whole, self._start + start, self._start + stop)
