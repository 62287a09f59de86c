"""Whether Triton's forms of the operators are chosen on a device: asked when a site is made, never in a step."""

from __future__ import annotations

import importlib.util

import torch


def triton_here(device: torch.device | str) -> bool:
    """On CUDA devices, wherever triton is installed."""
    return torch.device(device).type == "cuda" and importlib.util.find_spec("triton") is not None
