"""A side network beside the base, which reads what the base's layers give and changes none of them."""

from peftmux.kernels.ladder.reference import (
    ACTIVATIONS,
    Affine,
    Attend,
    Ladder,
    Rung,
    SideBlock,
    apply_ladder,
    causal,
    climb,
    finish,
    rotation,
    start,
)

__all__ = [
    "ACTIVATIONS",
    "Affine",
    "Attend",
    "Ladder",
    "Rung",
    "SideBlock",
    "apply_ladder",
    "causal",
    "climb",
    "finish",
    "rotation",
    "start",
]
