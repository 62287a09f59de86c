"""Bottlenecks by Triton: three launches for all adapters of a step.

Fusions, and bottlenecks whose update is normed, run one adapter after the other as in `site.BranchSite`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from peftmux.kernels.bottleneck import reference
from peftmux.kernels.bottleneck import triton_kernels as kernels
from peftmux.kernels.bottleneck.reference import Bottleneck, Fusion, LayerNorm
from peftmux.kernels.bottleneck.site import BranchSite, PreparedBranch
from peftmux.kernels.lowrank import Segments
from peftmux.kernels.lowrank.workspace import workspace
from peftmux.kernels.slots import SlotTable
from peftmux.kernels.tree import tensors

ACTIVATIONS = ("elu", "gelu", "gelu_new", "leakyrelu", "linear", "relu", "relu6", "sigmoid", "silu", "tanh")
READS = ("branch", "sum", "residual")
_GRANULE = 16
"""Inner widths are filled up to a multiple of it, so that rows of `up` are read in whole vectors."""
_PROGRAMS = 512
"""Of the launch that goes down, about."""


@torch.library.custom_op("peftmux::bottlenecks_", mutates_args={"y"})
def bottlenecks_(
    y: Tensor, h: Tensor, slots: Tensor, tiles: Tensor, order: Tensor, table: Tensor, block_m: int, widest: int
) -> None:
    """y + A(z) for the tokens whose slot has a record (see `triton_kernels`); others are not touched.

    y, h: [rows, D], slots: [T] int32, T <= rows, tiles and order as in `lowrank.tiles.Tiles`, table: [S, 10] int64,
    widest: no record's m is larger.
    """
    rows, width = y.shape
    if y.stride(1) != 1 or h.shape != y.shape or len(slots) > rows:
        raise ValueError(f"expected h {list(y.shape)} for {len(slots)} tokens, got {list(h.shape)}, {y.stride()}")
    h = h if h.stride(1) == 1 else h.contiguous()
    z, t = y.new_empty(rows, width), y.new_empty(rows, widest)
    block, warps = read_tile(width)
    kernels.read_kernel[(len(slots),)](
        y,
        h,
        z,
        slots,
        table,
        len(table),
        y.stride(0),
        h.stride(0),
        reference.EPSILON,
        WIDTH=width,
        BLOCK=block,
        num_warps=warps,
    )
    down, up = down_shape(block_m, width, y.element_size()), up_shape(block_m, widest, y.element_size())
    shared = (tiles, order, table, len(table), width, widest)
    programs = min(triton.cdiv(widest, down.block_n), max(1, _PROGRAMS // len(tiles)))
    kernels.down_kernel[(len(tiles), programs)](z, t, *shared, **down.options(block_m))
    kernels.up_kernel[(len(tiles), triton.cdiv(width, up.block_n))](t, y, *shared, y.stride(0), **up.options(block_m))


@dataclass(frozen=True, slots=True)
class ProductShape:
    """Of one program."""

    block_n: int
    block_k: int
    stages: int

    def options(self, block_m: int) -> dict[str, int]:
        sizes = {"BLOCK_M": block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}
        return {**sizes, "num_warps": 8 if block_m >= 64 else 4, "num_stages": self.stages}


def read_tile(width: int) -> tuple[int, int]:
    """(columns, warps) of a program that reads one token."""
    block = int(triton.next_power_of_2(width))
    return block, max(1, min(32, block // 512))


def down_shape(block_m: int, width: int, itemsize: int) -> ProductShape:
    """Of tiles of block_m tokens with `width` inputs."""
    block_n, block_k = (16, 256) if block_m == 1 else (64 if block_m > 16 else 16, 64) if itemsize == 2 else (16, 32)
    return ProductShape(block_n, max(16, min(block_k, int(triton.next_power_of_2(width)))), 3 if itemsize == 2 else 2)


def up_shape(block_m: int, widest: int, itemsize: int) -> ProductShape:
    """Of tiles of block_m tokens with at most `widest` inputs."""
    block_n, block_k = (64, 64) if itemsize == 2 and block_m > 1 else (32, 32)
    return ProductShape(block_n, max(16, min(block_k, int(triton.next_power_of_2(widest)))), 2)


def in_kernels(part: Bottleneck | Fusion) -> bool:
    """Do the kernels compute it?"""
    return isinstance(part, Bottleneck) and part.norms[1] is None


class TritonBranchSite(BranchSite):
    """As its base."""

    def __init__(self, dtype: torch.dtype, device: torch.device, on_change: Callable[[bool], None]) -> None:
        super().__init__(dtype, device, on_change)
        self._table = SlotTable(int(kernels.FIELDS.value), device)
        self._plain: set[int] = set()
        """Slots that the kernels do not compute."""
        self._widest = 0

    @property
    def graphed(self) -> bool:
        return not self._plain

    def prepare(self, part: Bottleneck | Fusion) -> PreparedBranch:
        """For the kernels the inner width is filled up with zeros, and vectors are float32, rounded as the rest is."""
        prepared = super().prepare(part)
        placed = prepared.part
        if not (isinstance(placed, Bottleneck) and in_kernels(placed)):
            return prepared
        width, more = placed.up.shape[0], -placed.rank % _GRANULE
        before = placed.norms[0]
        norm = None if before is None else LayerNorm(before.weight.float(), before.bias.float())
        laid_out = Bottleneck(
            down=pad(placed.down, (0, 0, 0, more)).contiguous(),
            down_bias=pad(placed.down_bias, (0, more)).float(),
            up=pad(placed.up, (0, more)).contiguous(),
            up_bias=placed.up_bias.float(),
            scale=placed.scale.float().expand(width).contiguous(),
            activation=placed.activation,
            reads=placed.reads,
            norms=(norm, None),
        )
        return PreparedBranch(laid_out, sum(t.nbytes for t in tensors(laid_out)))

    def put(self, slot: int, prepared: PreparedBranch) -> None:
        part = prepared.part
        super().put(slot, prepared)
        if not (isinstance(part, Bottleneck) and in_kernels(part)):
            self._plain.add(slot)
            return
        if part.rank > self._widest:
            self._widest = part.rank
            workspace(self._device).moved()  # what a graph has captured has no room for it
        norm, activation = part.norms[0], "silu" if part.activation == "swish" else part.activation
        self._table.put(
            slot,
            *(part.down, part.up, part.down_bias, part.up_bias, part.scale),
            *((0, 0) if norm is None else (norm.weight, norm.bias)),
            *(part.rank, ACTIVATIONS.index(activation), READS.index(part.reads)),
        )

    def drop(self, slot: int) -> None:
        super().drop(slot)
        self._plain.discard(slot)
        self._table.drop(slot)

    def apply(self, y: Tensor, h: Tensor, segments: Segments) -> None:
        if self._table and segments.touches(self._held):
            tiles = segments.tiles
            slots, table = segments.token_slots, self._table.tensor
            bottlenecks_(y, h, slots, tiles.tiles, tiles.order, table, tiles.block_m, self._widest)
        if self._plain:
            self.apply_runs(y, h, segments, self._plain)
