"""Every launch of the norm kernel that serving makes, by the widths of common bases."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from peftmux.kernels.compile import Budget, Variant
from peftmux.kernels.norms import triton_kernels as kernels
from peftmux.kernels.norms.triton_path import slot_norm_tile


def variants() -> Iterable[Variant]:
    """RMS norms of rows and of heads, layer norms; Gemma's weight counts from one."""
    yield from _variant("bf16", 4096, 1, False, 0.0)
    yield from _variant("bf16", 128, 32, False, 0.0)
    yield from _variant("bf16", 4096, 1, False, 1.0)
    for dtype in ("bf16", "fp16", "fp32"):
        yield from _variant(dtype, 4096, 1, True, 0.0)


def _variant(dtype: str, width: int, heads: int, centred: bool, offset: float) -> Iterator[Variant]:
    block, rows, warps = slot_norm_tile(width, heads)
    strides = ("x_token", "x_head", "y_token", "y_head")
    types = dict.fromkeys(("x", "y", "like"), f"*{dtype}") | dict.fromkeys(strides, "i32")
    name = f"{'layer' if centred else 'rms'}{'1' * bool(offset)}"
    yield Variant(
        f"slot_norm-{name}-{dtype}-{width}",
        kernels.slot_norm_kernel,
        types | {"slots": "*i32", "table": "*i64", "capacity": "i32", "heads": "i32", "eps": "fp32"},
        {"WIDTH": width, "ROWS": rows, "BLOCK": block, "CENTRED": centred, "OFFSET": offset},
        num_warps=warps,
        divisible=strides,
        budget=Budget(registers=80, shared=4096),
    )
