"""Virtual tokens among the real ones of a row."""

from peftmux.kernels.virtual.reference import VirtualRows, virtual_embeddings
from peftmux.kernels.virtual.site import PreparedVirtual, VirtualSite

__all__ = ["PreparedVirtual", "VirtualRows", "VirtualSite", "virtual_embeddings"]
