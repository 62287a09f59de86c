"""Every launch of the row-wise kernels that serving makes, by the widths of common bases."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from peftmux.kernels.compile import Budget, Variant
from peftmux.kernels.elementwise import triton_kernels as kernels
from peftmux.kernels.elementwise.triton_path import add_norm_tile, norm_tile, rotate_tile, swiglu_tile

_SMALL = Budget(registers=64, shared=4096)
_HIDDEN = {"bf16": (2048, 4096, 8192), "fp16": (4096,), "fp32": (2048,)}
"""Widths of whole rows, by dtype."""


def variants() -> Iterable[Variant]:
    """Whole rows and heads, queries with few keys, feed-forward widths; each dtype a base may have."""
    for dtype in _HIDDEN:
        yield from _norms(f"*{dtype}", dtype)
        yield _rotation(f"*{dtype}", dtype)
        for scaled in (False, True):
            yield _swiglu(f"*{dtype}", dtype, scaled)


def _norms(pointer: str, dtype: str) -> Iterator[Variant]:
    types = {"x": pointer, "weight": pointer, "out": pointer, "rows": "i32", "x_token": "i32", "eps": "fp32"}
    for width in (128, *_HIDDEN[dtype]):
        block, rows, warps = norm_tile(width)
        heads: dict[str, Any] = {"heads": "i32", "x_head": "i32"} if width == 128 else {}
        fixed = {} if heads else {"heads": 1, "x_head": 0}
        yield Variant(
            f"rms_norm-{dtype}-{width}",
            kernels.rms_norm_kernel,
            types | heads,
            {**fixed, "WIDTH": width, "ROWS": rows, "BLOCK": block},
            num_warps=warps,
            divisible=("x_token", *(["x_head"] if heads else [])),
            budget=_SMALL,
        )
    for width in _HIDDEN[dtype]:
        block, warps = add_norm_tile(width)
        pointers = dict.fromkeys(("x", "stream", "weight", "total", "out"), pointer)
        yield Variant(
            f"add_rms_norm-{dtype}-{width}",
            kernels.add_rms_norm_kernel,
            pointers | {"x_row": "i32", "stream_row": "i32", "eps": "fp32"},
            {"WIDTH": width, "BLOCK": block},
            num_warps=warps,
            divisible=("x_row", "stream_row"),
            budget=_SMALL,
        )


def _rotation(pointer: str, dtype: str) -> Variant:
    strides = ("q_token", "q_head", "k_token", "k_head")
    heads, block = rotate_tile(64)
    return Variant(
        f"rotate_pair-{dtype}",
        kernels.rotate_pair_kernel,
        dict.fromkeys(("q", "k", "cos", "sin"), pointer) | dict.fromkeys(strides, "i32"),
        {"Q_HEADS": 32, "K_HEADS": 8, "HALF": 64, "HEADS": heads, "BLOCK": block},
        divisible=strides,
        budget=_SMALL,
    )


def _swiglu(pointer: str, dtype: str, scaled: bool) -> Variant:
    tables = {"slots": "*i32", "scales": "*i64"} if scaled else {"slots": pointer, "scales": pointer}
    return Variant(
        f"swiglu-{dtype}{'-scaled' * scaled}",
        kernels.swiglu_kernel,
        {"gate_up": pointer, "out": pointer, **tables, "tokens": "i32", "capacity": "i32", "row_stride": "i32"},
        {"WIDTH": 14336, "BLOCK": swiglu_tile(14336), "SCALED": scaled},
        divisible=("row_stride",),
        budget=_SMALL,
    )
