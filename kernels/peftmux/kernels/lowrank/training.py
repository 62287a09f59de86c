"""Which form of the low-rank term of many adapters, with gradients, trains on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from peftmux.kernels.lowrank.reference import LinearPart
from peftmux.kernels.lowrank.segments import Segments

AddLowRank = Callable[[Tensor, Tensor, Mapping[int, LinearPart], Segments], Tensor]


def choose_training(device: torch.device) -> AddLowRank:
    """(y [T, N], x [T, K], parts of a, b and scale by slot, segments) -> [T, N], differentiable in all tensors."""
    if device.type == "cuda":
        from peftmux.kernels.lowrank import triton_grad

        return triton_grad.add_lowrank
    from peftmux.kernels.lowrank import torch_grad

    return torch_grad.add_lowrank
