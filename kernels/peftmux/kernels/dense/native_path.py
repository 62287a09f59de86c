"""Linear layers in C++, on the CPU's matrix tiles (native/src/dense.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from peftmux.kernels.dense.columns import Columns
from peftmux.kernels.dense.layout import DEPTH, PANEL, pack, packed_elements, unpack
from peftmux.kernels.dense.pages import HugePages
from peftmux.kernels.native.library import Function


class NativeForm:
    """Makes the layers of one model; their weights share memory maps."""

    def __init__(self, product: Function) -> None:
        self._product = product
        self._pages = HugePages()

    def __call__(self, weight: Tensor, bias: Tensor | None) -> NativeDense:
        """weight: [N, K], bias: [N], both bfloat16."""
        if weight.dtype is not torch.bfloat16 or (bias is not None and bias.dtype is not torch.bfloat16):
            raise ValueError(f"expected torch.bfloat16, got {weight.dtype}, bias {bias is not None and bias.dtype}")
        outputs, inputs = weight.shape
        if bias is not None and bias.shape != (outputs,):
            raise ValueError(f"expected bias of shape ({outputs},), got {tuple(bias.shape)}")
        packed = self._pages.empty(packed_elements(outputs, inputs))
        pack(weight, packed)
        return NativeDense(self._product, packed, bias if bias is None else bias.contiguous(), outputs, inputs)


class NativeDense:
    """bfloat16 in CPU memory. A row of y is the same to the bit whatever other rows there are.

    The tiles take numbers below 2^-126 in size as zero.
    """

    def __init__(self, product: Function, packed: Tensor, bias: Tensor | None, outputs: int, inputs: int) -> None:
        """packed: as `layout.pack` fills it, and more behind it where these are some outputs of a layer."""
        self._product = product
        self._packed = packed
        self._bias = bias
        self._outputs, self._inputs = outputs, inputs
        self._steps = -(-inputs // DEPTH)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.bfloat16 or x.shape[-1] != self._inputs:
            raise ValueError(f"expected torch.bfloat16 [..., {self._inputs}], got {x.dtype} {tuple(x.shape)}")
        rows = self._rows(x)
        y = torch.empty((*x.shape[:-1], self._outputs), dtype=torch.bfloat16)
        self._product(
            rows.data_ptr(),
            rows.stride(0),
            self._packed.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            y.data_ptr(),
            rows.shape[0],
            self._steps,
            self._outputs,
            torch.get_num_threads(),
        )
        return y

    def weight(self) -> Tensor:
        """[N, K], as it was given, in memory of its own."""
        return unpack(self._packed, self._outputs, self._inputs)

    def columns(self, start: int, stop: int) -> NativeDense | Columns:
        """These panels alone are read, where the first output begins one."""
        if start % PANEL:
            return Columns(self, start, stop)
        first, last = packed_elements(start, self._inputs), packed_elements(stop, self._inputs)
        bias = None if self._bias is None else self._bias[start:stop]
        return NativeDense(self._product, self._packed[first:last], bias, stop - start, self._inputs)

    def _rows(self, x: Tensor) -> Tensor:
        """[rows, K rounded up to whole tiles] of neighbouring elements; a view wherever there is one."""
        rows = x if x.dim() == 2 else x.reshape(-1, self._inputs)
        if self._inputs % DEPTH:
            return pad(rows, (0, -self._inputs % DEPTH))
        return rows if rows.stride(1) == 1 else rows.contiguous()
