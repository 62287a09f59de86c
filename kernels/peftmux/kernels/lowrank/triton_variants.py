"""Every form of the gathered kernels that serving launches, for ahead-of-time compilation.

A form depends on the table in `triton_shapes`, not on a model's widths: these steps and sites reach all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, product

from peftmux.kernels.compile import Budget, Variant
from peftmux.kernels.lowrank import triton_kernels
from peftmux.kernels.lowrank.tiles import rows_per_tile
from peftmux.kernels.lowrank.triton_shapes import Shape, choose
from peftmux.kernels.lowrank.triton_table import padded

_TOKENS = (1, 8, 16, 64, 256, 512, 2048, 8192)
_RANKS = (8, 32, 64)
_GATED = (False, True)
_SLICES = (1, 2, 3)
_WIDTH = 4096
_TABLES = {"tiles": "*i32", "order": "*i32", "table": "*i64", "slots": "i32"}
_SHRINK = {"partial": "*fp32", "arrived": "*i32", "width": "i32", "stride_x": "i32", "stride_t": "i32"}
_SHRINK_DIVISIBLE = ("width", "stride_x", "stride_t", "stride_partial", "stride_part", "slots")
_BUDGET = Budget(registers=255, shared=99 * 1024)


def variants() -> Iterator[Variant]:
    """Every form in bfloat16; in float16, which compiles alike, and in float32 some of each kind."""
    yield from _outers()
    seen: set[str] = set()
    tuned = product(("bf16",), _SLICES, _TOKENS, _RANKS, _GATED)
    others = product(("fp16", "fp32"), (3,), (8, 64, 2048), (32,), _GATED)
    for kind, slices, tokens, rank, gated in chain(tuned, others):
        shape = _shape(tokens, slices, rank, 4 if kind == "fp32" else 2, gated)
        for variant in (_shrink(kind, slices, shape), _expand(kind, shape)):
            if variant.name not in seen:
                seen.add(variant.name)
                yield variant


def _outers() -> Iterator[Variant]:
    for kind, block_r, block_n in (*product(("bf16",), (16, 32), (32, 128)), ("fp32", 32, 32), ("fp32", 32, 128)):
        yield Variant(
            name=f"outer_{kind}_r{block_r}_n{block_n}",
            kernel=triton_kernels.outer,
            signature={
                **{name: type_ for name, type_ in _TABLES.items() if name != "tiles"},
                "left": f"*{kind}",
                "right": f"*{kind}",
                "groups": "*i32",
                "width": "i32",
                "stride_left": "i32",
                "stride_right": "i32",
            },
            constants={
                "BLOCK_M": 32 if kind == "fp32" else 64,
                "BLOCK_R": block_r,
                "BLOCK_N": block_n,
                "ALIGNED": True,
            },
            num_warps=4,
            num_stages=3,
            divisible=("width", "stride_left", "stride_right"),
        )


def _shape(tokens: int, slices: int, rank: int, itemsize: int, gated: bool) -> Shape:
    block_m = rows_per_tile(tokens)
    return choose(block_m, tokens, _WIDTH, slices * padded(rank), rank, itemsize, gated)


def _shrink(kind: str, slices: int, shape: Shape) -> Variant:
    split = "_split" if shape.parts > 1 else ""
    gated = "_gated" if shape.block_e else ""
    return Variant(
        name=f"shrink_{kind}_s{slices}_m{shape.block_m}_r{shape.block_r}{split}{gated}",
        kernel=triton_kernels.shrink,
        signature={
            **_TABLES,
            **_SHRINK,
            "x": f"*{kind}",
            "t": f"*{kind}",
            "stride_partial": "i32",
            "stride_part": "i32",
            "parts": "i32",
        },
        constants={
            "SLICES": slices,
            "SPLIT": shape.parts > 1,
            "BLOCK_M": shape.block_m,
            "BLOCK_R": shape.block_r,
            "BLOCK_K": shape.block_k,
            "BLOCK_E": shape.block_e,
            "ALIGNED": True,
        },
        num_warps=shape.shrink_warps,
        num_stages=shape.shrink_stages,
        max_registers=shape.shrink_registers or None,
        divisible=_SHRINK_DIVISIBLE,
        budget=_BUDGET,
    )


def _expand(kind: str, shape: Shape) -> Variant:
    return Variant(
        name=f"expand_{kind}_m{shape.block_m}_r{shape.reduce_r}",
        kernel=triton_kernels.expand,
        signature={
            **_TABLES,
            "t": f"*{kind}",
            "y": f"*{kind}",
            "columns": "*i32",
            "stride_table": "i32",
            "stride_t": "i32",
            "stride_y": "i32",
        },
        constants={
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
