"""Every launch of the embedding kernel that serving makes."""

from __future__ import annotations

from collections.abc import Iterable

from peftmux.kernels.compile import Budget, Variant
from peftmux.kernels.embedding import triton_kernels as kernels
from peftmux.kernels.embedding.triton_path import IDS, RANKS, embedding_tile


def variants() -> Iterable[Variant]:
    """One width stands for all: the tile is the same."""
    block, warps = embedding_tile(4096)
    for dtype in ("bf16", "fp16", "fp32"):
        yield Variant(
            f"embedding-{dtype}",
            kernels.embedding_kernel,
            {"y": f"*{dtype}", "ids": "*i64", "slots": "*i32", "table": "*i64", "capacity": "i32", "y_row": "i32"},
            {"WIDTH": 4096, "BLOCK": block, "RANKS": RANKS, "IDS": IDS},
            num_warps=warps,
            divisible=("y_row",),
            budget=Budget(registers=168, shared=8192),
        )
