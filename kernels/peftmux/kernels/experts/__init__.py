"""Low-rank updates of mixture-of-experts weights, and of the router that chooses among them."""

from peftmux.kernels.experts.pairs import Group, Pairs
from peftmux.kernels.experts.reference import ExpertsPart, RouterPart, apply_experts_part, routed_weight
from peftmux.kernels.experts.site import ExpertsSite, PreparedExperts

__all__ = [
    "ExpertsPart",
    "ExpertsSite",
    "Group",
    "Pairs",
    "PreparedExperts",
    "RouterPart",
    "apply_experts_part",
    "routed_weight",
]
