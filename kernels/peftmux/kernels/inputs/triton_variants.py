"""Every launch of the scaling kernel that serving makes."""

from __future__ import annotations

from collections.abc import Iterable

from peftmux.kernels.compile import Budget, Variant
from peftmux.kernels.inputs import triton_kernels as kernels
from peftmux.kernels.inputs.triton_path import scale_tile


def variants() -> Iterable[Variant]:
    """One width stands for all: the tile is the same."""
    for dtype in ("bf16", "fp16", "fp32"):
        yield Variant(
            f"scale_rows-{dtype}",
            kernels.scale_rows_kernel,
            {
                "x": f"*{dtype}",
                "out": f"*{dtype}",
                "slots": "*i32",
                "scales": "*i64",
                "tokens": "i32",
                "capacity": "i32",
                "x_row": "i32",
            },
            {"WIDTH": 14336, "BLOCK": scale_tile(14336)},
            divisible=("x_row",),
            budget=Budget(registers=40, shared=1024),
        )
