"""Classification heads: what stands on the final hidden states instead of the output projection."""

from peftmux.kernels.head.reference import ACTIVATIONS, Head, HeadLayer, apply_head
from peftmux.kernels.head.site import HeadSite, PreparedHead

__all__ = ["ACTIVATIONS", "Head", "HeadLayer", "HeadSite", "PreparedHead", "apply_head"]
