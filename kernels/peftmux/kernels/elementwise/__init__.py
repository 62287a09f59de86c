"""Row-wise operators of a transformer layer."""

from peftmux.kernels.elementwise.launch import ElementwisePath, choose_elementwise
from peftmux.kernels.elementwise.reference import rms_norm, rotate_, rotated, swiglu

__all__ = ["ElementwisePath", "choose_elementwise", "rms_norm", "rotate_", "rotated", "swiglu"]
