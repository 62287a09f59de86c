"""Which form of the row-wise operators a model runs: decided once, when it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from peftmux.kernels import native
from peftmux.kernels.elementwise.native_path import NativeElementwise
from peftmux.kernels.elementwise.torch_path import rms_norm, rotate_, swiglu
from peftmux.kernels.triton_here import triton_here


@dataclass(frozen=True, slots=True)
class ElementwisePath:
    """The chosen form and its name. The functions are those of `reference`."""

    name: str
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    rotate_: Callable[[Tensor, Tensor, Tensor], Tensor]
    rotate_pair_: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None
    """rotate_ of two tensors [T, heads, D] in one launch, where this form has that."""
    scaled_swiglu: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """swiglu, the rows scaled by their slots' vectors, where this form has that (see `triton_path.scaled_swiglu`)."""


def choose_elementwise(device: torch.device | str, dtype: torch.dtype) -> ElementwisePath:
    """The fastest form here for activations of this dtype on this device."""
    if triton_here(device):
        from peftmux.kernels.elementwise import triton_path as gpu

        pair, scaled = gpu.rotate_pair_, gpu.scaled_swiglu
        return ElementwisePath("triton", gpu.rms_norm, gpu.swiglu, gpu.rotate_, pair, scaled)
    if native.Library.supports(device, dtype) and (library := native.load()):
        own = NativeElementwise(library, dtype)
        return ElementwisePath("native", own.rms_norm, own.swiglu, own.rotate_)
    return ElementwisePath("torch", rms_norm, swiglu, rotate_)
