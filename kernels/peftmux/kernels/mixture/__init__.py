"""Low-rank variants of a whole feed-forward block, of which a router chooses some for each token."""

from peftmux.kernels.mixture.reference import MixturePart, apply_mixture_part, route
from peftmux.kernels.mixture.site import BlockShape, MixtureSite, PreparedMixture

__all__ = ["BlockShape", "MixturePart", "MixtureSite", "PreparedMixture", "apply_mixture_part", "route"]
