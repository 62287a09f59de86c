"""Adapters, mixes and an independent float64 evaluation for the tests of the gathered kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from peftmux.kernels.lowrank import LinearPart, Prepared, Segments
from peftmux.kernels.lowrank import triton_kernels as kernels
from peftmux.kernels.lowrank.layout import prepare
from peftmux.kernels.lowrank.triton_path import TritonPath

Widths = tuple[int, tuple[int, ...]]
EVEN: Widths = (272, (80, 48, 160))
"""Multiples of 16; one slice is wider than a program's columns."""
LONG: Widths = (528, (48,))
"""A width that is split into parts also where each row is a tile."""
ODD: Widths = (63, (60, 130, 5))

# Ranks of the slices (None: the slice is left alone), what the epilogue has, experts of each slice.
ADAPTERS: dict[int, tuple[tuple[int | None, ...], str, tuple[int, ...]]] = {
    1: ((8, 8, 8), "", (0, 0, 0)),
    2: ((16, 0, 3), "scale", (0, 0, 0)),
    3: ((0, 0, 0), "scale+bias", (0, 0, 0)),
    4: ((64, 33, 1), "", (0, 0, 0)),
    5: ((1, None, 7), "bias", (0, 0, 0)),
    6: ((None, 4, None), "", (0, 0, 0)),
    7: ((18, 0, 8), "scale+bias", (3, 0, 4)),
    8: ((5, 80, 16), "", (0, 16, 0)),
}
FAR_SLOT = 300
"""More than the table begins with."""

MIXES: dict[str, tuple[Sequence[int], Sequence[int]]] = {
    "identical": ([1] * 9, [1] * 9),
    "distinct": ([1, 2, 3, 4, 5, 6, 7, 8], [1] * 8),
    "distinct in tiles": ([1, 2, 3, 4, 5, 6, 7, 8], [2] * 8),
    "zipf": ([1, 1, 1, 1, 1, 4, 1, 4, 4, 2, 8, 1, 6, 0, 1, 0], [1] * 12 + [2, 3, 1, 5]),
    "base only": ([0, 0, 0], [1, 1, 5]),
    "empty": ([], []),
    "prefill beside decode": ([0, 5, 7, 0, 7, 1, 4], [1, 1, 63, 60, 7, 97, 60]),
    "not resident here": ([99, 1, 999], [1, 2, 3]),
}


def make_parts(slot: int, widths: Widths) -> list[LinearPart | None]:
    generator = torch.Generator().manual_seed(slot)
    width, slices = widths

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ranks, epilogue, experts = ADAPTERS[slot]
    parts: list[LinearPart | None] = []
    for rank, out, gates in zip(ranks, slices, experts, strict=False):
        if rank is None:
            parts.append(None)
            continue
        parts.append(
            LinearPart(
                a=random(rank, width) / width**0.5 if rank else None,
                b=random(out, rank) if rank else None,
                scale=0.3 * slot,
                out_scale=random(out) if "scale" in epilogue else None,
                bias=random(out) if "bias" in epilogue else None,
                gate=random(gates, width) / width**0.5 if gates else None,
            )
        )
    return parts


def between_nans(prepared: Prepared) -> Prepared:
    """The same, every tensor inside memory that holds nan before and after it."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        around = torch.full((tensor.numel() + 256,), torch.nan, dtype=tensor.dtype)
        inside = around[128:-128].view(tensor.shape)
        return inside.copy_(tensor)

    pieces: dict[str, Any] = {name: moved(getattr(prepared, name)) for name in ("a", "b", "out_scale", "bias")}
    return dataclasses.replace(prepared, **pieces)


def make_path(widths: Widths, dtype: torch.dtype, slots: Iterable[int] = ADAPTERS) -> TritonPath:
    width, slices = widths
    path = TritonPath(width, slices, dtype, "cpu")
    for slot in slots:
        path.put(slot, between_nans(prepare(make_parts(slot, widths), width, slices, dtype, torch.device("cpu"))))
    return path


def poison(path: TritonPath, segments: Segments, dtype: torch.dtype) -> Any:
    """nan in everything that a step writes before it reads it. -> the buffers."""
    tiles = segments.tiles
    held = path._workspace.buffers(len(tiles.order), len(tiles.tiles), dtype)
    held.t.fill_(torch.nan)
    held.partial.fill_(torch.nan)
    return held


def batch(tokens: int, widths: Widths, dtype: torch.dtype, padding: int = 3) -> tuple[Tensor, Tensor]:
    """-> y and x with rows past the batch's end that hold nan."""
    generator = torch.Generator().manual_seed(tokens)
    y = torch.randn(tokens + padding, sum(widths[1]), generator=generator)
    x = torch.randn(tokens + padding, widths[0], generator=generator)
    y[tokens:], x[tokens:] = torch.nan, torch.nan
    return y.to(dtype), x.to(dtype)


def exact(y: Tensor, x: Tensor, segments: Segments, widths: Widths) -> tuple[Tensor, Tensor]:
    """-> (the definition, written out in float64 with weights rounded to y's dtype; its terms' magnitudes)."""
    dtype = y.dtype
    out, size = y.double(), y.double().abs()
    for slot, start, end in segments.runs:
        if slot not in ADAPTERS:
            continue
        column = 0
        for part, width in zip(make_parts(slot, widths), widths[1], strict=True):
            at = (slice(start, end), slice(column, column + width))
            column += width
            if part is not None:
                out[at], size[at] = one_part(out[at], size[at], x[start:end].double(), part, dtype)
    return out, size


def one_part(y: Tensor, size: Tensor, x: Tensor, part: LinearPart, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if part.a is not None and part.b is not None:
        a, b = part.a.to(dtype).double(), part.b.to(dtype).double()
        count = part.experts or 1
        shares = torch.ones(len(x), 1, dtype=torch.float64)
        if part.gate is not None:
            shares = (x @ part.gate.to(dtype).double().T).softmax(1)
        for e, (a_e, b_e) in enumerate(zip(a.chunk(count), b.chunk(count, 1), strict=True)):
            weight = part.scale * shares[:, e : e + 1]
            y = y + weight * (x @ a_e.T @ b_e.T)
            size = size + weight * (x.abs() @ a_e.abs().T @ b_e.abs().T)
    if part.out_scale is not None:
        y, size = y * part.out_scale, size * part.out_scale.abs()
    return (y, size) if part.bias is None else (y + part.bias, size + part.bias.abs())


def bound(expected: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
    """float32: 1e-6 of the terms' magnitudes, some units of rounding of a sum of some hundred terms.

    bfloat16 and float16: t is rounded once, which passes through B (a unit of rounding of the terms), then the sum.
    """
    error = 1e-6 * size
    if dtype is not torch.float32:
        unit = torch.finfo(dtype).eps / 2
        error = error + unit * (expected.abs() + size)
    return error


class Launches:
    """The kernels that run, with their constants, instead of the kernels themselves."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, tuple[int, ...], dict[str, Any]]] = []
        for name in ("shrink", "expand"):
            patch.setattr(kernels, name, _Recorded(name, getattr(kernels, name), self))

    def names(self) -> list[str]:
        return [name for name, _, _ in self.seen]


class _Recorded:
    def __init__(self, name: str, kernel: Any, launches: Launches) -> None:
        self._of = (name, kernel, launches)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        name, kernel, launches = self._of

        def launch(*arguments: Any, **constants: Any) -> Any:
            launches.seen.append((name, grid, constants))
            return kernel[grid](*arguments, **constants)

        return launch
