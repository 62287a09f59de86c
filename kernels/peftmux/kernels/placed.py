"""How an adapter's tensors come to a site: on its device, in its dtype, and finite there."""

from __future__ import annotations

import torch
from torch import Tensor


def placed(tensor: Tensor, device: torch.device, dtype: torch.dtype, what: str) -> Tensor:
    """The tensor there, contiguous. ValueError where the dtype cannot hold its values, which are `what`."""
    return checked(tensor.detach().to(device, dtype).contiguous(), what)


def checked(tensor: Tensor, what: str) -> Tensor:
    """The same tensor. ValueError where it is not finite: rows of other adapters may share a product with it.

    The smallest and the largest value show that, since NaN propagates through both.
    """
    if tensor.numel() and not bool(torch.stack(torch.aminmax(tensor)).isfinite().all()):
        raise ValueError(f"expected finite values, got inf or nan in {what} as {tensor.dtype}")
    return tensor
