"""Whether two ways of computing something are the same function, seen on examples."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""What rounding alone may make of a few operations in a row, as a share of the largest result."""


def agree(a: Tensor, b: Tensor) -> bool:
    """Equal to rounding. Measured by the results' own size: weights may be as small as they like."""
    if a.shape != b.shape:
        return False
    if not b.is_floating_point():
        return torch.equal(a, b)
    allowed = ROUNDING.get(b.dtype, 0.0) * float(b.abs().max())
    return bool((a.float() - b.float()).abs().max() <= allowed)


def example(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers, the same in every call, in the dtype and on the device of `like`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def widened(x: Tensor, inner: Tensor) -> Tensor:
    """x as large as makes `inner`, which is linear in it, spread by 2: there activations differ from each other."""
    spread = float(inner.float().std())
    return x * (2.0 / spread) if spread > 0 else x
