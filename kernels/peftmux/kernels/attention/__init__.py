"""Attention of a flat batch over a paged key/value cache."""

from peftmux.kernels.attention.cache import copy_blocks, write_kv
from peftmux.kernels.attention.launch import AttentionPath, choose_attention
from peftmux.kernels.attention.reference import paged_attention
from peftmux.kernels.attention.rows import AttentionRows
from peftmux.kernels.attention.static import StaticRows

__all__ = [
    "AttentionPath",
    "AttentionRows",
    "StaticRows",
    "choose_attention",
    "copy_blocks",
    "paged_attention",
    "write_kv",
]
