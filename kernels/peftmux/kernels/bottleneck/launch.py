"""Which form of bottlenecks a residual branch runs: decided once, when its site is made."""

from __future__ import annotations

from collections.abc import Callable

import torch

from peftmux.kernels.bottleneck.site import BranchSite
from peftmux.kernels.triton_here import triton_here


def branch_site(dtype: torch.dtype, device: torch.device, on_change: Callable[[bool], None]) -> BranchSite:
    """on_change: told whether any adapter is here."""
    if triton_here(device):
        from peftmux.kernels.bottleneck.triton_path import TritonBranchSite

        return TritonBranchSite(dtype, device, on_change)
    return BranchSite(dtype, device, on_change)
