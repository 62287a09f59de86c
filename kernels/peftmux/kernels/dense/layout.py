"""The order in which native/src/dense.cpp reads a weight."""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 16
"""Outputs of one tile, and the pairs of inputs in it."""
DEPTH = 2 * TILE
"""Inputs of one tile."""
PANEL = 2 * TILE
"""Outputs of one panel: two tiles side by side."""


def packed_elements(outputs: int, inputs: int) -> int:
    """Elements of a packed weight [outputs, inputs]: both are rounded up to 32."""
    return _up(outputs, PANEL) * _up(inputs, DEPTH)


def pack(weight: Tensor, into: Tensor) -> None:
    """weight: [N, K] bfloat16 -> into: [packed_elements(N, K)], as [panel, step of K, tile, pair, output, 2 inputs].

    What is added to N and K is zero.
    """
    outputs, inputs = weight.shape
    steps, whole = _up(inputs, DEPTH) // DEPTH, outputs - outputs % PANEL
    panels = into.view(torch.int32).view(-1, steps, 2, TILE, TILE)
    if inputs % DEPTH:
        weight = torch.nn.functional.pad(weight, (0, -inputs % DEPTH))
    panels[: whole // PANEL] = _tiles(weight[:whole], steps)
    if whole < outputs:
        rest = weight.new_zeros(PANEL, steps * DEPTH)
        rest[: outputs - whole] = weight[whole:]
        panels[whole // PANEL :] = _tiles(rest, steps)


def unpack(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """The weight [outputs, inputs] that `pack` was given."""
    steps = _up(inputs, DEPTH) // DEPTH
    pairs = packed.view(torch.int32).view(-1, steps, 2, TILE, TILE).permute(0, 2, 4, 1, 3)
    rows = pairs.reshape(-1, steps * TILE).view(torch.bfloat16)
    return rows[:outputs, :inputs].contiguous()


def _tiles(weight: Tensor, steps: int) -> Tensor:
    """[panels * 32, steps * 32] -> [panels, steps, 2, pair, output] of two neighbouring inputs each."""
    pairs = weight.contiguous().view(torch.int32)
    return pairs.view(-1, 2, TILE, steps, TILE).permute(0, 3, 1, 4, 2)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
