"""Low-rank experts at a linear site, weighed for each token by shares that are made outside of it."""

from peftmux.kernels.routed.reference import RoutedPart, ShareRule, apply_routed_part, shares_from
from peftmux.kernels.routed.site import PreparedRouted, RoutedSite, Shares

__all__ = [
    "PreparedRouted",
    "RoutedPart",
    "RoutedSite",
    "ShareRule",
    "Shares",
    "apply_routed_part",
    "shares_from",
]
