"""How row-wise forms see their inputs."""

from __future__ import annotations

from torch import Tensor


def flat_rows(x: Tensor) -> Tensor:
    """x: [..., D] as [rows, D] of neighbouring elements; a view wherever there is one."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
