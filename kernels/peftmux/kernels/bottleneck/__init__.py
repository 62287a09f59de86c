"""Bottlenecks beside the residual stream, and attention over several of them."""

from peftmux.kernels.bottleneck.launch import branch_site
from peftmux.kernels.bottleneck.reference import (
    ACTIVATIONS,
    Bottleneck,
    Fusion,
    LayerNorm,
    apply_bottleneck,
    apply_fusion,
)
from peftmux.kernels.bottleneck.site import BranchSite, PreparedBranch

__all__ = [
    "ACTIVATIONS",
    "Bottleneck",
    "BranchSite",
    "Fusion",
    "LayerNorm",
    "PreparedBranch",
    "apply_bottleneck",
    "apply_fusion",
    "branch_site",
]
