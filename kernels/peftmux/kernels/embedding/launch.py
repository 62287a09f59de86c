"""Which form of the input embedding's adapters runs: decided once, when the site is made."""

from __future__ import annotations

import torch

from peftmux.kernels.embedding.site import EmbeddingSite
from peftmux.kernels.triton_here import triton_here


def embedding_site(device: torch.device, factor: float = 1.0) -> EmbeddingSite:
    """factor: what the base multiplies its rows with when they are looked up."""
    if triton_here(device):
        from peftmux.kernels.embedding.triton_path import TritonEmbeddingSite

        return TritonEmbeddingSite(device, factor)
    return EmbeddingSite(device, factor)
