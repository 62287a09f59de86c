"""Gathered low-rank updates: many adapters' rows of one batch at one linear site."""

from peftmux.kernels.lowrank.layout import Prepared
from peftmux.kernels.lowrank.reference import LinearPart, apply_linear_part
from peftmux.kernels.lowrank.segments import Segments
from peftmux.kernels.lowrank.site import LowRankSite
from peftmux.kernels.lowrank.training import choose_training

__all__ = ["LinearPart", "LowRankSite", "Prepared", "Segments", "apply_linear_part", "choose_training"]
