"""Replaced parameters of normalisation layers."""

from peftmux.kernels.norms.launch import norm_site
from peftmux.kernels.norms.reference import NormPart, apply_norm_part
from peftmux.kernels.norms.site import NormSite, PreparedNorm

__all__ = ["NormPart", "NormSite", "PreparedNorm", "apply_norm_part", "norm_site"]
