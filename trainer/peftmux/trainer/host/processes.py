"""Sums over the processes that train one adapter."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def processes() -> int:
    return distributed.get_world_size() if _several() else 1


def rank() -> int:
    """This process's number, from 0."""
    return distributed.get_rank() if _several() else 0


def summed(x: Tensor) -> Tensor:
    """x added up over all processes, each of which calls this; without a gradient."""
    total = x.detach()
    if _several():
        total = total.clone()
        distributed.all_reduce(total)
    return total


def mean(x: Tensor) -> Tensor:
    """Of all values of x in all processes, a scalar without a gradient."""
    sums = summed(torch.stack([x.sum(), x.new_tensor(x.numel())]))
    return sums[0] / sums[1]


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
