"""Scaled inputs of a linear layer."""

from peftmux.kernels.inputs.reference import InputScale, scale_input
from peftmux.kernels.inputs.site import InputScaleSite, PreparedScale, SliceInputSite

__all__ = ["InputScale", "InputScaleSite", "PreparedScale", "SliceInputSite", "scale_input"]
