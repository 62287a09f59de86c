"""Adapters of a flat batch: (slots, lens) of its rows.

Slot 0 is the base model's; 9 and 999 hold no part, and 999 lies past the tables.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftmux.kernels.lowrank import Segments

MIXES: dict[str, tuple[list[int], list[int]]] = {
    "identical": ([1, 1, 1], [1, 2, 1]),
    "distinct": ([1, 2, 3], [1, 1, 1]),
    "zipf": ([1, 1, 0, 2, 1, 3], [3, 1, 2, 1, 1, 1]),
    "base only": ([0, 0], [2, 1]),
    "half base": ([0, 3, 0, 2], [1, 1, 2, 1]),
    "elsewhere": ([9, 999], [1, 2]),
    "empty": ([], []),
}
HELD = (1, 2, 3)
"""Slots in which tests put parts."""


def segments(mix: str) -> Segments:
    return Segments.build(*MIXES[mix])


def owners(mix: str) -> list[int]:
    """The slot of each token."""
    return [slot for slot, count in zip(*MIXES[mix], strict=True) for _ in range(count)]


def poisoned(values: Tensor) -> Tensor:
    """The same values, NaN before and behind them in memory, at an address of 16 bytes' alignment."""
    whole = torch.full((values.numel() + 32,), float("nan"), dtype=values.dtype)
    view = whole[16 : 16 + values.numel()].view(values.shape)
    return view.copy_(values)


BOUND = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Against float64, relative: a few units of rounding; for the 16-bit dtypes one rounding to the nearest."""


def close(got: Tensor, expected: Tensor, slack: float = 0.0) -> None:
    """got, rounded once to its dtype, is expected (float64). slack: of sums that may cancel, the size of a term."""
    bound = BOUND[got.dtype]
    torch.testing.assert_close(got.double(), expected, rtol=bound * 1.01, atol=max(bound * 1e-2, slack * 1e-6))
