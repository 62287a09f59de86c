"""How Triton's launches of paged attention are shaped: tile sizes and constants by head counts, widths and dtype."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from peftmux.kernels.attention.tiles import DECODE, KINDS, SPLIT_KEYS, WHOLE

WIDEST = 512
"""Elements of a key or value."""
MOST_ITEMS = 65_535
"""Programs of a grid's second axis, at most: each takes every so manieth item."""


@dataclass(frozen=True)
class Shape:
    """What a launch is compiled for, but for the options of a layer."""

    kind: int
    """Of `tiles.KINDS`."""
    kv_heads: int
    group: int
    key_dim: int
    value_dim: int
    block_size: int
    dtype: torch.dtype

    @cached_property
    def wide(self) -> int:
        """The wider of key and value, as the kernel pads it."""
        return max(padded(self.key_dim), padded(self.value_dim))

    @cached_property
    def block_m(self) -> int:
        """Queries a tile: 64 fill a Hopper matrix product; fewer where keys are the cost."""
        if self.kind == DECODE:
            return 16 if self.group <= 16 else 32
        if self.dtype is torch.float32:
            return 16
        return 64 if self.kind == WHOLE and self.wide <= 256 else 32

    @cached_property
    def block_n(self) -> int:
        """Keys at a time: what fits in registers where nothing is pipelined, else two of keys and values in flight."""
        if self.dtype is torch.float32:
            return 16
        if self.kind == WHOLE and self.wide in (128, 256):
            return 8192 // self.wide
        return max(16, min(32, 4096 // self.wide))

    @cached_property
    def heads(self) -> int:
        """Query heads a tile: those of a key/value head, or an equal part of them."""
        chunks = -(-self.group // self.block_m)
        return -(-self.group // chunks)

    @cached_property
    def programs(self) -> int:
        """Programs an item."""
        return self.kv_heads * -(-self.group // self.heads)

    @cached_property
    def queries(self) -> int:
        """Tokens a tile."""
        return 1 if self.kind == DECODE else self.block_m // self.heads

    @cached_property
    def num_stages(self) -> int:
        """Where keys lie is read one stage before they are: five stages hold two blocks of keys and of values.

        A product of 64 queries is not pipelined: its weights are an operand in registers, and ptxas before 13.3
        miscompiles that on Hopper (triton issue 9433). Of float32 keys wider than 256 one block is all that fits in
        the 99 KiB of shared memory of a consumer's GPU.
        """
        if self.block_m >= 64:
            return 1
        return 2 if self.wide > 256 and self.dtype is torch.float32 else 5

    @cached_property
    def num_warps(self) -> int:
        more = self.kind == WHOLE or self.dtype is torch.float32  # four would spill
        return 8 if self.wide > 256 or (self.wide > 128 and more) else 4

    @cached_property
    def max_registers(self) -> int:
        """A thread. Said explicitly, so that ptxas does not spill for the sake of occupancy."""
        return 168 if self.kind == DECODE and self.wide <= 128 and self.dtype is not torch.float32 else 255

    def programs_of(self, items: int, most: int) -> tuple[int, int]:
        """The grid: it follows from how many items there can be, never from how many there are."""
        programs = max(1, most // self.programs) if self.kind == DECODE else MOST_ITEMS
        return self.programs, min(items, programs)

    @cached_property
    def constants(self) -> dict[str, int]:
        """The kernel's constants, but for the options of a layer."""
        return {
            "KIND": self.kind,
            "KV_HEADS": self.kv_heads,
            "GROUP": self.group,
            "HEADS": self.heads,
            "LIVE": self.heads * self.queries,
            "KEY_DIM": self.key_dim,
            "VALUE_DIM": self.value_dim,
            "PAGE": self.block_size,
            "SPLIT": self.kind != WHOLE,
            "SPLIT_KEYS": SPLIT_KEYS,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": padded(self.key_dim),
            "BLOCK_V": padded(self.value_dim),
        }


def shapes_of(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> tuple[Shape, ...]:
    """Of a layer's tensors, by kind."""
    _, block_size, kv_heads, value_dim = v_cache.shape
    return _shapes(kv_heads, q.shape[1] // kv_heads, q.shape[2], value_dim, block_size, k_cache.dtype)


@cache
def _shapes(
    kv_heads: int, group: int, key_dim: int, value_dim: int, block_size: int, dtype: torch.dtype
) -> tuple[Shape, ...]:
    return tuple(Shape(kind, kv_heads, group, key_dim, value_dim, block_size, dtype) for kind in KINDS)


def padded(dim: int) -> int:
    """A power of two that a matrix product takes."""
    return max(16, 1 << (dim - 1).bit_length())


def store_shape(heads: int, key_dim: int, value_dim: int) -> dict[str, int]:
    """`store_kv`'s constants: some 2048 elements of a token at a time."""
    wide = max(padded(key_dim), padded(value_dim))
    return {
        "HEADS": heads,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_H": max(1, min(1 << (heads - 1).bit_length(), 2048 // wide)),
        "BLOCK_K": padded(key_dim),
        "BLOCK_V": padded(value_dim),
    }


def store_warps(constants: dict[str, int]) -> int:
    """Eight elements a thread."""
    elements = constants["BLOCK_H"] * min(constants["BLOCK_K"], constants["BLOCK_V"])
    return max(1, min(4, elements // 256))
