"""Which form of sparse changes a site runs: decided once, when it is made."""

from __future__ import annotations

import torch

from peftmux.kernels.sparse.site import SparseSite
from peftmux.kernels.triton_here import triton_here


def sparse_site(in_features: int, out_features: int, device: torch.device) -> SparseSite:
    """Of one linear layer."""
    if triton_here(device):
        from peftmux.kernels.sparse.triton_path import TritonSparseSite

        return TritonSparseSite(in_features, out_features, device)
    return SparseSite(in_features, out_features, device)
