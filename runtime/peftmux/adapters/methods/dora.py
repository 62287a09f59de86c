"""DoRA: the variant of LoRA that also learns each output feature's magnitude.

    y = m / ||W + s B A|| * (W x + s B A x) + b        ||.|| per output feature, no epsilon; the bias is not scaled

Source: Liu et al., 2024, arXiv 2402.09353. On an input embedding E the formula holds for W = E^T: one norm, over the
vocabulary, for each dimension of the embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_AT_A_TIME = 1 << 22
"""Weight elements: bounds the float32 copy of a bfloat16 weight to 16 MB."""


def weight_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float, squares: Tensor | None = None) -> Tensor:
    """||W + scale B A|| of each row, without forming B A: ||w||^2 + 2 s (B . W A^T) + s^2 (B A A^T . B).

    weight: [out, in], a: [r, in], b: [out, r] -> [out], in a's dtype. Differentiable. squares: ||w||^2, where known.
    """
    weight = weight.to(a.dtype)
    cross = (b * (weight @ a.T)).sum(dim=1)
    added = (b * (b @ (a @ a.T))).sum(dim=1)
    squares = weight.square().sum(dim=1) if squares is None else squares
    return (squares + 2 * scale * cross + scale**2 * added).clamp_min(0).sqrt()


def dora_out_scale(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor, squares: Tensor | None = None
) -> Tensor:
    """magnitude / ||W + scale B A||: [out]. The gradient reaches the magnitude only, as in the paper's section 4.3."""
    return magnitude / weight_norm(weight, a, b, scale, squares).detach()


def chunked_out_scale(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """`dora_out_scale` some rows at a time, where the weight is; the result is on the CPU."""
    rows = max(1, _ROWS_AT_A_TIME // weight.shape[1])
    a, b, magnitude = (t.to(weight.device) for t in (a, b, magnitude))
    pieces = (slice(start, start + rows) for start in range(0, weight.shape[0], rows))
    return torch.cat([dora_out_scale(weight[p], a, b[p], scale, magnitude[p]) for p in pieces]).cpu()
