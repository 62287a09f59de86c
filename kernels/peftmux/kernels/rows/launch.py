"""Which form of replaced rows a site runs: decided once, when it is made."""

from __future__ import annotations

import torch

from peftmux.kernels.rows.site import RowsSite
from peftmux.kernels.triton_here import triton_here


def rows_site(dtype: torch.dtype, device: torch.device) -> RowsSite:
    """Of one linear layer."""
    if triton_here(device):
        from peftmux.kernels.rows.triton_path import TritonRowsSite

        return TritonRowsSite(dtype, device)
    return RowsSite(dtype, device)
