"""The gathered operator in C++ (native/src/lowrank.cpp): one call a site, rows of one adapter together."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_void_p
from itertools import accumulate

import torch
from torch import Tensor

from peftmux.kernels.lowrank.layout import Prepared
from peftmux.kernels.lowrank.segments import Segments
from peftmux.kernels.native import Library

_PANEL = 64
"""As in lowrank.cpp: the columns of B that lie together."""


class _Slot(ctypes.Structure):
    _fields_ = [(n, c_void_p) for n in ("a", "b", "rank_scale", "out_scale", "bias", "rank_ends", "expert_ends")]


class _Site(ctypes.Structure):
    _fields_ = [
        *((n, c_int32) for n in ("in_features", "out_features", "slices", "slots")),
        ("slice_ends", c_void_p),
        ("table", c_void_p),
    ]


class NativePath:
    """One site's adapters as a table of addresses. The tensors behind them live in `_kept` until dropped."""

    name = "native"
    panel = _PANEL
    most_experts = None

    def __init__(self, library: Library, in_features: int, slices: tuple[int, ...], dtype: torch.dtype) -> None:
        self._function = library.function("peftmux_lowrank", dtype)
        self._slice_ends = (c_int32 * len(slices))(*accumulate(slices))
        self._table = (_Slot * 1)()
        self._site = _Site(in_features, sum(slices), len(slices), 1, ctypes.addressof(self._slice_ends), 0)
        self._site.table = ctypes.addressof(self._table)
        self._address = ctypes.addressof(self._site)
        self._kept: dict[int, object] = {}

    def put(self, slot: int, prepared: Prepared) -> None:
        if slot >= len(self._table):
            self._grow(slot + 1)
        ends = (c_int32 * len(prepared.ranks))(*accumulate(prepared.ranks))
        expert_ends = (c_int32 * len(prepared.experts))(*accumulate(prepared.experts))
        self._kept[slot] = (prepared, ends, expert_ends)
        self._table[slot] = _Slot(
            prepared.a.data_ptr(),
            prepared.b.data_ptr(),
            prepared.rank_scale.data_ptr(),
            None if prepared.out_scale is None else prepared.out_scale.data_ptr(),
            None if prepared.bias is None else prepared.bias.data_ptr(),
            ctypes.addressof(ends),
            ctypes.addressof(expert_ends) if prepared.gated else None,
        )

    def drop(self, slot: int) -> None:
        self._table[slot] = _Slot()
        del self._kept[slot]

    def _grow(self, slots: int) -> None:
        table = (_Slot * max(slots, 2 * len(self._table)))()
        ctypes.memmove(table, self._table, ctypes.sizeof(self._table))
        self._table = table
        self._site.slots = len(table)
        self._site.table = ctypes.addressof(table)

    def apply(self, y: Tensor, x: Tensor, segments: Segments) -> None:
        if x.stride(1) != 1 or y.stride(1) != 1:
            raise ValueError(f"expected rows of neighbouring elements, got strides {x.stride()} and {y.stride()}")
        runs = segments.by_slot
        self._function(
            self._address,
            y.data_ptr(),
            y.stride(0),
            x.data_ptr(),
            x.stride(0),
            runs.data_ptr(),
            runs.shape[0],
            segments.threads,
        )
