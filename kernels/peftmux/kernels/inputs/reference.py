"""A linear layer whose input is scaled feature by feature: y = W (scale * x) + b. The one definition.

Source: IA3 at feed-forward layers (Liu et al., 2022, arXiv 2205.05638). The layer's bias is not scaled.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class InputScale:
    """scale: [in]."""

    scale: Tensor


def scale_input(x: Tensor, part: InputScale) -> Tensor:
    """What the layer is given in the place of x: [T, in], in x's dtype, computed in the part's."""
    return (x * part.scale).to(x.dtype)
