"""Images as vectors that stand among a prompt's token embeddings."""

from peftmux.kernels.vision.reference import VisionPart, embed_patches
from peftmux.kernels.vision.site import PreparedVision, VisionSite

__all__ = ["PreparedVision", "VisionPart", "VisionSite", "embed_patches"]
