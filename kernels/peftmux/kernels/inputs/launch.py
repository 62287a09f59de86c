"""Which form of scaled inputs a site runs: decided once, when it is made."""

from __future__ import annotations

import torch

from peftmux.kernels.inputs.site import InputScaleSite
from peftmux.kernels.triton_here import triton_here


def input_scale_site(device: torch.device) -> InputScaleSite:
    """For the input that a layer has to itself."""
    if triton_here(device):
        from peftmux.kernels.inputs.triton_path import TritonInputScaleSite

        return TritonInputScaleSite(device)
    return InputScaleSite(device)
