"""Every launch of the sparse kernel that serving makes."""

from __future__ import annotations

from collections.abc import Iterable

from peftmux.kernels.compile import Budget, Variant
from peftmux.kernels.sparse import triton_kernels as kernels
from peftmux.kernels.sparse.triton_path import REGISTERS, sparse_tile

_THREADS = 128


def variants() -> Iterable[Variant]:
    """Decode and prefill. x is gathered element by element, in a loop that the assembler unrolls once."""
    for dtype in ("bf16", "fp16", "fp32"):
        for block_m in (1, 16):
            rows, block_n, block_j = sparse_tile(block_m)
            narrow = 2 * rows * block_n * block_j // _THREADS
            yield Variant(
                f"sparse-{dtype}-{block_m}",
                kernels.sparse_kernel,
                {"y": f"*{dtype}", "x": f"*{dtype}", "tiles": "*i32", "order": "*i32", "table": "*i64"}
                | dict.fromkeys(("capacity", "y_row", "x_row"), "i32"),
                {"WIDTH": 4096, "BLOCK_M": rows, "BLOCK_N": block_n, "BLOCK_J": block_j},
                num_stages=1,
                max_registers=REGISTERS,
                divisible=("capacity", "y_row", "x_row"),
                narrow_loads=0 if dtype == "fp32" else narrow,
                budget=Budget(registers=REGISTERS, shared=8192),
            )
