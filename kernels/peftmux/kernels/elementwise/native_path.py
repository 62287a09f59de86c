"""Row-wise operators in C++ (native/src/elementwise.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from peftmux.kernels.elementwise.flat import flat_rows
from peftmux.kernels.native import Library


class NativeElementwise:
    """For tensors of one dtype in CPU memory. Called by the thread that runs the model."""

    def __init__(self, library: Library, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._rms_norm = library.function("peftmux_rms_norm", dtype)
        self._swiglu = library.function("peftmux_swiglu", dtype)
        self._rotate = library.function("peftmux_rotate", dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As `reference.rms_norm`."""
        width = x.shape[-1]
        self._check(x, weight)
        if weight.shape != (width,):
            raise ValueError(f"expected weight of shape ({width},), got {tuple(weight.shape)}")
        rows = flat_rows(x)
        out = torch.empty(x.shape, dtype=self._dtype)
        self._rms_norm(
            rows.data_ptr(),
            rows.stride(0),
            weight.data_ptr(),
            out.data_ptr(),
            rows.shape[0],
            width,
            eps,
            torch.get_num_threads(),
        )
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """As `reference.swiglu`."""
        self._check(gate_up)
        width = gate_up.shape[-1] // 2
        rows = flat_rows(gate_up)
        out = torch.empty((*gate_up.shape[:-1], width), dtype=self._dtype)
        self._swiglu(rows.data_ptr(), rows.stride(0), out.data_ptr(), rows.shape[0], width, torch.get_num_threads())
        return out

    def rotate_(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """As `reference.rotate_`; tokens and heads of x may stand apart."""
        self._check(x, cos, sin)
        tokens, heads, width = x.shape
        turned = cos.shape[-1]
        if cos.shape != (tokens, turned) or sin.shape != cos.shape or turned > width or turned % 2:
            raise ValueError(
                f"expected cos and sin [{tokens}, even and at most {width}], got {tuple(cos.shape)}, {tuple(sin.shape)}"
            )
        if x.stride(2) != 1:
            raise ValueError(f"expected heads of neighbouring elements, got strides {x.stride()}")
        if not (cos.is_contiguous() and sin.is_contiguous()):
            cos, sin = cos.contiguous(), sin.contiguous()
        self._rotate(
            x.data_ptr(),
            x.stride(0),
            x.stride(1),
            cos.data_ptr(),
            sin.data_ptr(),
            turned,
            tokens,
            heads,
            turned // 2,
            torch.get_num_threads(),
        )
        return x

    def _check(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            if tensor.dtype is not self._dtype:
                raise ValueError(f"expected {self._dtype}, got {tensor.dtype}")
