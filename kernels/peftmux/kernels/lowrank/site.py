"""The adapters at one linear site of the base model, and what they add to its output."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from peftmux.kernels import native
from peftmux.kernels.lowrank.layout import Prepared, prepare
from peftmux.kernels.lowrank.native_path import NativePath
from peftmux.kernels.lowrank.reference import LinearPart
from peftmux.kernels.lowrank.segments import Segments
from peftmux.kernels.lowrank.torch_path import TorchPath

_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Path(Protocol):
    """One form of the operator, with one site's adapters."""

    @property
    def name(self) -> str: ...

    @property
    def panel(self) -> int | None:
        """As `prepare` takes it."""
        ...

    @property
    def most_experts(self) -> int | None:
        """As `prepare` takes it."""
        ...

    def put(self, slot: int, prepared: Prepared) -> None: ...

    def drop(self, slot: int) -> None: ...

    def apply(self, y: Tensor, x: Tensor, segments: Segments) -> None: ...


def _path(in_features: int, slices: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Path:
    """The fastest that this device and dtype have."""
    if device.type == "cuda" and dtype in _TRITON_DTYPES and importlib.util.find_spec("triton"):
        from peftmux.kernels.lowrank.triton_path import TritonPath

        return TritonPath(in_features, slices, dtype, device)
    library = native.load() if native.Library.supports(device, dtype) else None
    return NativePath(library, in_features, slices, dtype) if library else TorchPath(slices)


class LowRankSite:
    """One linear layer, or several that read the same input and write neighbouring slices of one output.

    `prepare` may run in any thread; everything else belongs to the thread that runs the model.
    """

    def __init__(
        self, in_features: int, slices: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.in_features = in_features
        self.slices = tuple(slices)
        self.out_features = sum(self.slices)
        self.dtype = dtype
        self.device = torch.device(device)
        self._held: dict[int, Prepared] = {}
        self._path = _path(in_features, self.slices, dtype, self.device)
        self._shapes = (self.out_features, in_features)

    @property
    def path(self) -> str:
        """Which form of the operator runs here: "triton", "native" or "torch"."""
        return self._path.name

    @property
    def empty(self) -> bool:
        return not self._held

    def has(self, slot: int) -> bool:
        return slot in self._held

    def bytes(self, slot: int) -> int:
        """What the adapter in this slot occupies here."""
        return self._held[slot].nbytes

    def prepare(self, parts: Sequence[LinearPart | None]) -> Prepared:
        """One part per slice, laid out for this site; see `layout.prepare` for its errors."""
        path = self._path
        return prepare(parts, self.in_features, self.slices, self.dtype, self.device, path.panel, path.most_experts)

    def put(self, slot: int, prepared: Prepared) -> None:
        """Place an adapter; slot 0 is the base model's and a taken slot must be dropped first."""
        if slot < 1 or slot in self._held:
            raise ValueError(f"expected a free slot of at least 1, got {slot}")
        self._path.put(slot, prepared)
        self._held[slot] = prepared

    def drop(self, slot: int) -> None:
        """Forget the adapter in this slot, if one is here."""
        if self._held.pop(slot, None) is not None:
            self._path.drop(slot)

    def apply(self, y: Tensor, x: Tensor, segments: Segments) -> None:
        """Add, in place, what each token's adapter does. y: [T, N] the base layer's output, x: [T, K] its input.

        y is row-major (its rows may stand apart), x contiguous. Tokens of slot 0, of slots with nothing here, and from
        segments.num_tokens on are not written.
        """
        if not (self._held and segments.runs) and segments.buffer is None:
            return
        if (y.shape[1], x.shape[1]) != self._shapes or y.shape[0] != x.shape[0] or not y.dtype is x.dtype is self.dtype:
            raise ValueError(
                f"expected y [T, {self.out_features}] and x [T, {self.in_features}] in {self.dtype}, "
                f"got {tuple(y.shape)} in {y.dtype} and {tuple(x.shape)} in {x.dtype}"
            )
        if x.shape[0] < segments.num_tokens:
            raise ValueError(f"expected at least {segments.num_tokens} rows, got {x.shape[0]}")
        self._path.apply(y, x, segments)
