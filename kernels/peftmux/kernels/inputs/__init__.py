"""Scaled inputs of a linear layer."""

from peftmux.kernels.inputs.launch import input_scale_site
from peftmux.kernels.inputs.reference import InputScale, scale_input
from peftmux.kernels.inputs.site import GatheredScales, InputScaleSite, PreparedScale, SliceInputSite

__all__ = [
    "GatheredScales",
    "InputScale",
    "InputScaleSite",
    "PreparedScale",
    "SliceInputSite",
    "input_scale_site",
    "scale_input",
]
