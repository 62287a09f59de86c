"""Adapters of the input embedding."""

from peftmux.kernels.embedding.launch import embedding_site
from peftmux.kernels.embedding.reference import EmbeddingPart, apply_embedding_part, scaled_part
from peftmux.kernels.embedding.site import EmbeddingSite, PreparedEmbedding

__all__ = [
    "EmbeddingPart",
    "EmbeddingSite",
    "PreparedEmbedding",
    "apply_embedding_part",
    "embedding_site",
    "scaled_part",
]
