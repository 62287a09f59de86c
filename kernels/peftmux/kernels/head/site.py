"""The heads of the adapters on one device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftmux.kernels.head.reference import Head, HeadLayer, apply_head


@dataclass(frozen=True, slots=True, eq=False)
class PreparedHead:
    """A head on its device: owned by the site once put."""

    head: Head
    nbytes: int


class HeadSite:
    """`prepare` may run in any thread; everything else belongs to the thread that runs the model.

    Heads stay float32 whatever the base's dtype is: they are small, and their logits are the answer.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[int, Head] = {}

    def prepare(self, part: Head) -> PreparedHead:
        layers = tuple(self._move(layer) for layer in (*part.hidden, part.output))
        head = replace(part, hidden=layers[:-1], output=layers[-1])
        tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias) if tensor is not None]
        return PreparedHead(head, sum(tensor.nbytes for tensor in tensors))

    def _move(self, layer: HeadLayer) -> HeadLayer:
        bias = None if layer.bias is None else layer.bias.to(self._device, torch.float32)
        return HeadLayer(layer.weight.to(self._device, torch.float32).contiguous(), bias)

    def put(self, slot: int, prepared: PreparedHead) -> None:
        self._held[slot] = prepared.head

    def drop(self, slot: int) -> None:
        self._held.pop(slot, None)

    def apply(self, slot: int, states: Tensor) -> Tensor:
        """states: [N, D], all of this slot's adapter -> logits [N, C] float32."""
        return apply_head(states, self._held[slot])
