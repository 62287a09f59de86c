"""Sparse changes of a linear layer's weight."""

from peftmux.kernels.sparse.launch import sparse_site
from peftmux.kernels.sparse.reference import SparsePart, apply_sparse_part
from peftmux.kernels.sparse.site import PreparedSparse, SparseSite

__all__ = ["PreparedSparse", "SparsePart", "SparseSite", "apply_sparse_part", "sparse_site"]
