"""Low-rank variants of a whole feed-forward block, of which a router chooses some for each token."""

from peftmux.kernels.mixture.reference import MixturePart, all_shares, apply_mixture_part, choose, route
from peftmux.kernels.mixture.site import BlockShape, MixtureSite, PreparedMixture

__all__ = [
    "BlockShape",
    "MixturePart",
    "MixtureSite",
    "PreparedMixture",
    "all_shares",
    "apply_mixture_part",
    "choose",
    "route",
]
