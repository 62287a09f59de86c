"""Which form of the two kernels runs: a table over tokens, widths and ranks, fixed before a graph is captured.

Every form computes every rank and every mix; the ranks given here only choose how the work is cut.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftmux.kernels.lowrank.triton_table import GRANULE, MOST_EXPERTS

_PROGRAMS = 512
"""About four on each multiprocessor of a large device: below, the width is split."""
MOST_PARTS = 8
MOST_SPLIT_ROWS = 8192
"""Tokens times parts: what the partial sums need room for."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Constants of one launch of each kernel, and how many programs share the columns of t."""

    block_m: int
    block_r: int
    """Columns of t that a program of `shrink` makes at once."""
    block_k: int
    parts: int
    programs: int
    shrink_warps: int
    shrink_stages: int
    block_n: int
    reduce_r: int
    """Ranks that `expand` multiplies at once."""
    expand_warps: int
    expand_stages: int
    block_e: int = MOST_EXPERTS


def power_of_two(n: int) -> int:
    """The smallest that is not less."""
    return 1 << max(n - 1, 0).bit_length()


def choose(block_m: int, tokens: int, tiles: int, width: int, columns: int, rank: int, itemsize: int) -> Shape:
    """width: of x; columns: most columns of t that an adapter here has, rank: its widest slice; itemsize: x's bytes."""
    columns, rank = max(columns, GRANULE), max(rank, GRANULE)
    wide = block_m >= 64
    tuned = itemsize == 2
    if wide:
        block_r, block_k = min(power_of_two(columns), 64 if tuned else 32), 64 if tuned else 32
    elif block_m == 1:
        block_r, block_k = GRANULE, 256
    else:
        block_r, block_k = 32 if columns > 64 else GRANULE, 128 if tuned else 64
    block_k = min(block_k, max(power_of_two(width), GRANULE))
    programs = min(-(-columns // block_r), 16)
    return Shape(
        block_m=block_m,
        block_r=block_r,
        block_k=block_k,
        parts=_parts(tokens, tiles * programs, width, block_k),
        programs=programs,
        shrink_warps=4,
        shrink_stages=4 if wide else 3,
        block_n=128 if tuned else 64,
        reduce_r=min(power_of_two(rank), GRANULE if block_m == 1 else 64 if tuned else 32),
        expand_warps=2 if block_m == 1 else 4,
        expand_stages=2,
    )


def _parts(tokens: int, programs: int, width: int, block_k: int) -> int:
    """A power of two, so that few forms are compiled."""
    most = min(MOST_PARTS, width // block_k, MOST_SPLIT_ROWS // power_of_two(tokens), -(-_PROGRAMS // programs))
    return 1 << max(most, 1).bit_length() - 1
