"""Every launch of the rows kernel that serving makes."""

from __future__ import annotations

from collections.abc import Iterable

from peftmux.kernels.compile import Budget, Variant
from peftmux.kernels.rows import triton_kernels as kernels
from peftmux.kernels.rows.triton_path import rows_shape

_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}


def variants() -> Iterable[Variant]:
    """Tiles of one token, of decode and of prefill."""
    for dtype, size in _SIZES.items():
        for block_m in (1, 16, 64):
            shape = rows_shape(block_m, 4096, size)
            integers = ("capacity", "width", "y_row", "x_row")
            yield Variant(
                f"replaced_rows-{dtype}-{block_m}",
                kernels.replaced_rows_kernel,
                {"y": f"*{dtype}", "x": f"*{dtype}", "tiles": "*i32", "order": "*i32", "table": "*i64"}
                | dict.fromkeys(integers, "i32"),
                {"BLOCK_M": block_m, "BLOCK_N": shape.block_n, "BLOCK_K": shape.block_k},
                num_warps=shape.warps,
                num_stages=shape.stages,
                divisible=integers,
                budget=Budget(registers=200, shared=64 * 1024),
            )
