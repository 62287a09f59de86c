"""Patches of an image as token embeddings. The one definition.

    v[n] = W_out ( norm(W_patch x[n] + b) + pos[n] ),    norm(z) = z / sqrt(mean(z^2) + eps) * weight

for the patches of a grid, row by row; x[n] is a patch's [channel, row, column], flattened, so that W_patch is a
convolution with the stride of its size. A grid of more patches than there are positions takes them from the square of
positions by bilinear interpolation, a smaller one the first of them.

Source: VoRA (Wang et al., 2025, arXiv 2503.20680), and how its code embeds images.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

from torch import Tensor
from torch.nn.functional import interpolate, linear

from peftmux.kernels.elementwise import rms_norm


@dataclass(frozen=True, slots=True)
class VisionPart:
    """What one adapter makes of images.

    patch: [C, 3 * p * p], patch_bias: [C], norm: [C], positions: [P, C], out: [D, C].
    """

    patch: Tensor
    patch_bias: Tensor
    norm: Tensor
    eps: float
    positions: Tensor
    out: Tensor
    patch_size: int
    image_size: int
    """Height and width that encoded images are brought to."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of the three channels, for encoded images: (value / 255 - mean) / std."""
    bidirectional: bool
    """Tokens of one image, or of images that touch, see each other whatever their order."""


def embed_patches(x: Tensor, rows: int, columns: int, part: VisionPart) -> Tensor:
    """The definition above, differentiable. x: [rows * columns, 3 * p * p] -> [rows * columns, D]."""
    z = linear(x.to(part.patch.dtype), part.patch, part.patch_bias)
    z = rms_norm(z.float(), part.norm, part.eps)
    return linear(z + grid_positions(part.positions, rows, columns), part.out)


def grid_positions(positions: Tensor, rows: int, columns: int) -> Tensor:
    """[P, C] -> [rows * columns, C]."""
    if rows * columns <= len(positions):
        return positions[: rows * columns]
    side = isqrt(len(positions))
    square = positions.view(1, side, side, -1).permute(0, 3, 1, 2)
    wider = interpolate(square, size=(rows, columns), mode="bilinear", align_corners=False)
    return wider.permute(0, 2, 3, 1).reshape(rows * columns, -1)
