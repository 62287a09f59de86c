"""The adapters that scale the input of one linear layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from peftmux.kernels.inputs.reference import InputScale, scale_input
from peftmux.kernels.lowrank import Segments


@dataclass(frozen=True, slots=True, eq=False)
class PreparedScale:
    """A part on its device, in float32: owned by the site once put."""

    part: InputScale
    nbytes: int


class InputScaleSite:
    """Where the layer has its input to itself. `prepare` may run in any thread; the rest belongs to the model's."""

    graphed = False
    """Whether a captured CUDA graph serves whatever adapters come here later."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[int, InputScale] = {}

    @property
    def empty(self) -> bool:
        return not self._held

    def prepare(self, part: InputScale) -> PreparedScale:
        scale = part.scale.to(self._device).contiguous()
        return PreparedScale(InputScale(scale), scale.nbytes)

    def put(self, slot: int, prepared: PreparedScale) -> None:
        self._held[slot] = prepared.part

    def drop(self, slot: int) -> None:
        self._held.pop(slot, None)

    def _runs(self, segments: Segments) -> list[tuple[InputScale, int, int]]:
        return [(self._held[slot], start, end) for slot, start, end in segments.runs if slot in self._held]

    def scaled(self, x: Tensor, segments: Segments) -> Tensor:
        """x: [T, in] -> itself where no token's adapter scales it, else a copy in which those rows are scaled."""
        runs = self._runs(segments)
        if not runs:
            return x
        copy = x.clone()
        for part, start, end in runs:
            copy[start:end] = scale_input(x[start:end], part)
        return copy


@runtime_checkable
class GatheredScales(Protocol):
    """A site whose scales kernels can look up by themselves."""

    def of_step(self, segments: Segments) -> tuple[Tensor, Tensor] | None:
        """([T] int32, each token's slot; [S, 1] int64, each slot's scale: the address of float32 [in], or 0).

        None where no token's adapter scales.
        """
        ...


class SliceInputSite(InputScaleSite):
    """Where siblings share the input: this layer's slice of their output is computed again for the rows concerned."""

    def __init__(self, device: torch.device, layer: Callable[[Tensor], Tensor]) -> None:
        """layer: [T, in] -> [T, out], the base's."""
        super().__init__(device)
        self._layer = layer

    def apply(self, y: Tensor, x: Tensor, segments: Segments) -> None:
        """Write, in place, the outputs of tokens whose adapter scales the input. y: [T, out], x: [T, in].

        The layer is called once for all of them: its weight is read once.
        """
        runs = self._runs(segments)
        if not runs:
            return
        made = self._layer(torch.cat([scale_input(x[start:end], part) for part, start, end in runs]))
        for (_, start, end), own in zip(runs, made.split([end - start for _, start, end in runs]), strict=True):
            y[start:end] = own
