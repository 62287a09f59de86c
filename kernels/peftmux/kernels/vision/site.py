"""The adapters that take images, on their device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftmux.kernels.vision.reference import VisionPart, embed_patches


@dataclass(frozen=True, slots=True, eq=False)
class PreparedVision:
    """In float32: owned by the site once put."""

    part: VisionPart

    @property
    def nbytes(self) -> int:
        part = self.part
        return sum(t.nbytes for t in (part.patch, part.patch_bias, part.norm, part.positions, part.out))


class VisionSite:
    """`prepare` may run in any thread; everything else belongs to the thread that runs the model."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[int, VisionPart] = {}

    def prepare(self, part: VisionPart) -> PreparedVision:
        pieces = (part.patch, part.patch_bias, part.norm, part.positions, part.out)
        patch, patch_bias, norm, positions, out = (t.to(self._device).contiguous() for t in pieces)
        on_device = replace(part, patch=patch, patch_bias=patch_bias, norm=norm, positions=positions, out=out)
        return PreparedVision(on_device)

    def put(self, slot: int, prepared: PreparedVision) -> None:
        self._held[slot] = prepared.part

    def drop(self, slot: int) -> None:
        self._held.pop(slot, None)

    def embed(self, slot: int, x: Tensor, rows: int, columns: int) -> Tensor:
        """[rows * columns, D] float32 of an image's patches [rows * columns, 3 * p * p]."""
        return embed_patches(x.to(self._device), rows, columns, self._held[slot])
