"""Which form of the two kernels runs: a table over tokens, widths and ranks, fixed before a graph is captured.

Every form computes every rank and every mix. How a sum over the width is cut follows from the number of tokens and the
width alone, so that a row's bits do not depend on which adapters are there; their ranks only choose how many columns
are made at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftmux.kernels.lowrank.triton_table import GRANULE, MOST_EXPERTS

MOST_PARTS = 8
MOST_SPLIT_ROWS = 8192
"""Tokens times parts: what the partial sums need room for."""
_MOST_PROGRAMS = 16
"""That share the columns of t."""


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
    shrink_registers: int
    """A thread's at most, 0 for what the compiler chooses."""
    block_n: int
    reduce_r: int
    """Ranks that `expand` multiplies at once."""
    expand_warps: int
    expand_stages: int
    block_e: int
    """Experts that a gate weighs; 0 where no adapter has one, which leaves their code out."""


def power_of_two(n: int) -> int:
    """The smallest that is not less."""
    return 1 << max(n - 1, 0).bit_length()


def choose(block_m: int, tokens: int, width: int, columns: int, rank: int, itemsize: int, gated: bool = False) -> Shape:
    """width: of x; columns: most columns of t that an adapter here has, rank: its widest slice; itemsize: x's bytes."""
    columns, rank = max(columns, GRANULE), max(rank, GRANULE)
    tuned, wide, single = itemsize == 2, block_m >= 64, block_m == 1
    block_r, block_k, stages, reduce_r = _blocks(columns, wide, single, tuned)
    if gated:
        block_r = GRANULE
    block_k = min(block_k, max(power_of_two(width), GRANULE))
    return Shape(
        block_m=block_m,
        block_r=block_r,
        block_k=block_k,
        parts=_parts(tokens, width // block_k, wide),
        programs=min(-(-columns // block_r), _MOST_PROGRAMS),
        shrink_warps=4 if tuned or single else 8,
        shrink_stages=stages,
        shrink_registers=0 if tuned or single else 240,
        block_n=128 if tuned else 64,
        reduce_r=min(power_of_two(rank), reduce_r),
        expand_warps=2 if single else 4,
        expand_stages=2,
        block_e=MOST_EXPERTS if gated else 0,
    )


def _blocks(columns: int, wide: bool, single: bool, tuned: bool) -> tuple[int, int, int, int]:
    """-> (block_r, block_k, stages of shrink, most of reduce_r)."""
    if single:
        return GRANULE, 256 if tuned else 128, 3, GRANULE
    if wide:
        most, k = (64, 64) if tuned else (32, 16)
        return min(power_of_two(columns), most), k, 4 if tuned else 3, most
    r = 32 if columns > 64 else GRANULE
    return (r, 128, 3, 64) if tuned else (GRANULE, 32, 3, 32)


def _parts(tokens: int, steps: int, wide: bool) -> int:
    """Into how many programs the width is cut: a power of two, so that few forms are compiled.

    About 500 programs where each token has its own adapter, about 128 where one adapter has all tokens of a prefill.
    """
    most = (MOST_SPLIT_ROWS if wide else 1024) // power_of_two(tokens)
    return 1 << max(min(MOST_PARTS, steps, most), 1).bit_length() - 1
