"""Every launch of the bottleneck kernels that serving makes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peftmux.kernels.bottleneck import triton_kernels as kernels
from peftmux.kernels.bottleneck.triton_path import ProductShape, down_shape, read_tile, up_shape
from peftmux.kernels.compile import Budget, Variant

_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
_WIDTH, _INNER = 4096, 256


def variants() -> Iterable[Variant]:
    """Tiles of one token, of decode and of prefill."""
    for dtype, size in _SIZES.items():
        pointer = f"*{dtype}"
        block, warps = read_tile(_WIDTH)
        numbers = ("capacity", "y_row", "h_row")
        yield Variant(
            f"read-{dtype}",
            kernels.read_kernel,
            dict.fromkeys(("y", "h", "z"), pointer)
            | {"slots": "*i32", "table": "*i64", "epsilon": "fp32"}
            | dict.fromkeys(numbers, "i32"),
            {"WIDTH": _WIDTH, "BLOCK": block},
            num_warps=warps,
            divisible=numbers,
            budget=Budget(registers=96, shared=4096),
        )
        for block_m in (1, 16, 64):
            yield _product(kernels.down_kernel, "down", dtype, block_m, down_shape(block_m, _WIDTH, size))
            yield _product(kernels.up_kernel, "up", dtype, block_m, up_shape(block_m, _INNER, size))


def _product(kernel: Any, name: str, dtype: str, block_m: int, shape: ProductShape) -> Variant:
    options = shape.options(block_m)
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    narrow = int(name == "up" and block_m == 1 and dtype != "fp32")  # of y, where a thread has one column
    pointers, numbers = (("z", "t"), ()) if name == "down" else (("t", "y"), ("y_row",))
    integers = ("capacity", "width", "t_row", *numbers)
    return Variant(
        f"{name}-{dtype}-{block_m}",
        kernel,
        dict.fromkeys(pointers, f"*{dtype}")
        | {"tiles": "*i32", "order": "*i32", "table": "*i64"}
        | dict.fromkeys(integers, "i32"),
        options,
        num_warps=warps,
        num_stages=stages,
        divisible=integers,
        narrow_loads=narrow,
        budget=Budget(registers=200, shared=64 * 1024),
    )
