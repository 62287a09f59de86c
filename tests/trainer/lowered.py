"""What an adapter's files lower to, run on a plain transformers model: the trained model must equal it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftmux.adapters.lower import load_adapter
from peftmux.adapters.parts import LoweredAdapter
from peftmux.adapters.torch_base import TorchBase
from peftmux.trainer.files.export import export_adapter
from peftmux.trainer.methods import AttachedAdapter
from tests.adapters.conftest import _logits


def lowered_logits(model: Any, adapter: LoweredAdapter, ids: Tensor, tasks: tuple[int, ...] = ()) -> Tensor:
    """Logits [rows, T, vocabulary] of unpadded rows `ids` [rows, T]; virtual tokens' own are left out."""
    return _logits(model, adapter, ids, tasks)[:, -ids.shape[1] :]


def check_parts_give_the_models_logits(
    model: Any, attached: AttachedAdapter, base: Any, ids: Tensor, folder: Path
) -> LoweredAdapter:
    """model: with `attached`; base: the same without. The parts of the files written to `folder`, which must matter."""
    attached.training_ended()
    export_adapter(attached, "base", folder, card="")
    with torch.no_grad():
        ours = model(input_ids=ids).logits
        assert (ours - base(input_ids=ids).logits).abs().max() > 1e-2
    lowered = load_adapter(folder, TorchBase(base))
    torch.testing.assert_close(ours, lowered_logits(base, lowered, ids), rtol=1e-5, atol=1e-5)
    return lowered
