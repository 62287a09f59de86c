"""What an adapter's files lower to, run on a plain transformers model: the trained model must equal it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peftmux.adapters.parts import LoweredAdapter
from tests.adapters.conftest import _logits


def lowered_logits(model: Any, adapter: LoweredAdapter, ids: Tensor, tasks: tuple[int, ...] = ()) -> Tensor:
    """Logits [rows, T, vocabulary] of unpadded rows `ids` [rows, T]; virtual tokens' own are left out."""
    return _logits(model, adapter, ids, tasks)[:, -ids.shape[1] :]
