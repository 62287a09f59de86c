"""Every form of the gathered kernels that serving launches, for ahead-of-time compilation.

A form depends on the table in `triton_shapes`, not on a model's widths: these steps and sites reach all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peftmux.kernels.compile import Budget, Variant
from peftmux.kernels.lowrank import triton_kernels
from peftmux.kernels.lowrank.tiles import capacity, rows_per_tile
from peftmux.kernels.lowrank.triton_shapes import Shape, choose
from peftmux.kernels.lowrank.triton_table import padded

_TOKENS = (1, 8, 16, 64, 256, 512, 2048, 8192)
_RANKS = (8, 32, 64)
_SLICES = (1, 2, 3)
_WIDTH = 4096
_TABLES = {"tiles": "*i32", "order": "*i32", "table": "*i64", "slots": "i32"}
_SHRINK = {"partial": "*fp32", "arrived": "*i32", "width": "i32", "stride_x": "i32", "stride_t": "i32"}
_SHRINK_DIVISIBLE = ("width", "stride_x", "stride_t", "stride_partial", "stride_part", "slots")
_BUDGET = Budget(registers=255, shared=99 * 1024)


def variants() -> Iterator[Variant]:
    """Every form in bfloat16; in float16, which compiles alike, and in float32 some of each kind."""
    seen: set[tuple[Any, ...]] = set()
    for kind in ("bf16", "fp16", "fp32"):
        for slices in _SLICES if kind == "bf16" else (3,):
            for tokens in _TOKENS if kind == "bf16" else (8, 64, 2048):
                for rank in _RANKS if kind == "bf16" else (32,):
                    shape = _shape(tokens, slices, rank, 4 if kind == "fp32" else 2)
                    for variant in (_shrink(kind, slices, shape), _expand(kind, slices, shape)):
                        key = (variant.name, *variant.constants.values())
                        if key not in seen:
                            seen.add(key)
                            yield variant


def _shape(tokens: int, slices: int, rank: int, itemsize: int) -> Shape:
    block_m = rows_per_tile(tokens)
    tiles = capacity(tokens, tokens, block_m)
    return choose(block_m, tokens, tiles, _WIDTH, slices * padded(rank), rank, itemsize)


def _shrink(kind: str, slices: int, shape: Shape) -> Variant:
    return Variant(
        name=f"shrink_{kind}_s{slices}_m{shape.block_m}_r{shape.block_r}_parts{shape.parts}",
        kernel=triton_kernels.shrink,
        signature={
            **_TABLES,
            **_SHRINK,
            "x": f"*{kind}",
            "t": f"*{kind}",
            "stride_partial": "i32",
            "stride_part": "i32",
        },
        constants={
            "SLICES": slices,
            "PARTS": shape.parts,
            "BLOCK_M": shape.block_m,
            "BLOCK_R": shape.block_r,
            "BLOCK_K": shape.block_k,
            "BLOCK_E": shape.block_e,
            "ALIGNED": True,
        },
        num_warps=shape.shrink_warps,
        num_stages=shape.shrink_stages,
        divisible=_SHRINK_DIVISIBLE,
        budget=_BUDGET,
    )


def _expand(kind: str, slices: int, shape: Shape) -> Variant:
    return Variant(
        name=f"expand_{kind}_s{slices}_m{shape.block_m}_r{shape.reduce_r}",
        kernel=triton_kernels.expand,
        signature={
            **_TABLES,
            "t": f"*{kind}",
            "y": f"*{kind}",
            "columns": "*i32",
            "stride_t": "i32",
            "stride_y": "i32",
        },
        constants={
            "SLICES": slices,
            "BLOCK_M": shape.block_m,
            "BLOCK_N": shape.block_n,
            "BLOCK_R": shape.reduce_r,
            "ALIGNED": True,
        },
        num_warps=shape.expand_warps,
        num_stages=shape.expand_stages,
        divisible=("stride_t", "stride_y", "slots"),
        narrow_loads=4 if shape.block_m == 1 else 0,  # t itself: one number for each row of B
        budget=_BUDGET,
    )
