"""Attention of a flat batch over a paged key/value cache."""

from peftmux.kernels.attention.cache import copy_blocks, write_kv
from peftmux.kernels.attention.launch import AttentionPath, choose_attention
from peftmux.kernels.attention.reference import paged_attention
from peftmux.kernels.attention.rows import AttentionRows

__all__ = ["AttentionPath", "AttentionRows", "choose_attention", "copy_blocks", "paged_attention", "write_kv"]
