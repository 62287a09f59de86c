"""Gathered low-rank updates: many adapters' rows of one batch at one linear site."""

from peftmux.kernels.lowrank.reference import LinearPart, apply_linear_part

__all__ = ["LinearPart", "apply_linear_part"]
