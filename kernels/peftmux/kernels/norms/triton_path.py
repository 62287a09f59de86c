"""Norms with each token's own parameters by Triton: one launch for all adapters of a step."""

from __future__ import annotations

import torch
import triton
from torch import Tensor, nn

from peftmux.kernels.lowrank import Segments
from peftmux.kernels.norms import triton_kernels as kernels
from peftmux.kernels.norms.formula import Formula
from peftmux.kernels.norms.site import NormSite, PreparedNorm
from peftmux.kernels.slots import SlotTable


@torch.library.custom_op("peftmux::slot_norm_", mutates_args={"y"})
def slot_norm_(
    y: Tensor, x: Tensor, like: Tensor, slots: Tensor, table: Tensor, eps: float, centred: bool, offset: float
) -> None:
    """Write to y the norm (see `formula.Formula`) of the tokens of x whose slot has a record.

    y, x: [tokens, H, D], slots: [T] int32, T <= tokens, table: [S, 2] int64, the addresses of weight and bias [D] in
    the dtype of `like`. What stands for other tokens stays.
    """
    tokens, heads, width = x.shape
    if y.shape != x.shape or len(slots) > tokens or y.stride(2) != 1:
        raise ValueError(
            f"expected y {list(x.shape)} for at least {len(slots)} tokens, got {list(y.shape)}, strides {y.stride()}"
        )
    x = x if x.stride(2) == 1 else x.contiguous()
    if len(slots) and heads:
        block, rows, warps = slot_norm_tile(width, heads)
        kernels.slot_norm_kernel[(len(slots), triton.cdiv(heads, rows))](
            x,
            y,
            like,
            slots,
            table,
            len(table),
            heads,
            x.stride(0),
            x.stride(1),
            y.stride(0),
            y.stride(1),
            eps,
            WIDTH=width,
            ROWS=rows,
            BLOCK=block,
            CENTRED=centred,
            OFFSET=offset,
            num_warps=warps,
        )


def slot_norm_tile(width: int, heads: int) -> tuple[int, int, int]:
    """(columns, heads, warps) of one program."""
    block = int(triton.next_power_of_2(width))
    rows = max(1, min(int(triton.next_power_of_2(heads)), 1024 // block))
    return block, rows, max(1, min(32, block * rows // 512))


class TritonNormSite(NormSite):
    """As its base, for a norm of a known formula."""

    graphed = True

    def __init__(self, norm: nn.Module, token_dim: int, formula: Formula) -> None:
        super().__init__(norm, token_dim)
        self._formula = formula
        weight = norm.weight
        assert isinstance(weight, Tensor)
        self._weight, self._bias = weight.detach(), getattr(norm, "bias", None)
        self._table = SlotTable(2, weight.device)

    def put(self, slot: int, prepared: PreparedNorm) -> None:
        super().put(slot, prepared)
        weight, bias = prepared.part.weight, prepared.part.bias
        bias = self._bias if bias is None else bias
        self._table.put(slot, self._weight if weight is None else weight, 0 if bias is None else bias.detach())

    def drop(self, slot: int) -> None:
        super().drop(slot)
        self._table.drop(slot)

    @torch.inference_mode()
    def apply(self, y: Tensor, x: Tensor, segments: Segments) -> None:
        if not segments.touches(self._held):
            return
        ours, given = (t.movedim(self._token_dim, 0) for t in (y, x))
        shape = (len(ours), -1, y.shape[-1])
        slot_norm_(
            ours.view(shape),
            given.reshape(shape),
            self._weight,
            segments.token_slots,
            self._table.tensor,
            self._formula.eps,
            self._formula.centred,
            self._formula.offset,
        )
