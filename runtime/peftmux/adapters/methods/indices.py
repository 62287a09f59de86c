"""Positions in a weight, as sparse methods store them."""

from __future__ import annotations

import torch
from torch import Tensor

from peftmux.adapters.base import LinearSite
from peftmux.adapters.errors import AdapterInvalid, Reason


def checked_indices(name: str, indices: Tensor, site: LinearSite) -> Tensor:
    """[2, n] (row, column) of the site's weight [out, in], as int64. AdapterInvalid outside of it, or where one is
    there twice.
    """
    if indices.is_floating_point():
        raise AdapterInvalid(Reason.UNSUPPORTED_DTYPE, f"tensor {name}: expected integers, got {indices.dtype}")
    places = indices.to(torch.int64)
    for row, (what, size) in zip(places, (("rows", site.out_features), ("columns", site.in_features)), strict=True):
        if row.numel() and not 0 <= int(row.min()) <= int(row.max()) < size:
            raise AdapterInvalid(
                Reason.INVALID_INDICES,
                f"tensor {name}: expected {what} from 0 to {size - 1}, got {int(row.min())} to {int(row.max())}",
            )
    if places.unique(dim=1).shape[1] != places.shape[1]:
        raise AdapterInvalid(Reason.INVALID_INDICES, f"tensor {name}: expected each position once")
    return places
