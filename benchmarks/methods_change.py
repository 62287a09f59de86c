"""What an adapter is beside the base's weights, counted from the file that is served: entries changed, and their rank.

Published comparisons count one of three things, as if they were one: parameters trained, parameters of the model that
become others, and the rank of that change.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftmux.adapters.checkpoint import load_checkpoint
from peftmux.adapters.errors import AdapterInvalid
from peftmux.adapters.lower import load_adapter
from peftmux.adapters.merge import merge
from peftmux.adapters.torch_base import TorchBase


def change_of(base: Path, adapter: Path) -> dict[str, Any]:
    """changed: entries of the base's weights that differ when the adapter is merged; None where it cannot be, being
    something beside them (virtual tokens, bottlenecks, gates). rank: the mean rank of the changed matrices' changes,
    None where no matrix changes. full: the mean of the largest rank that they could have.
    stored: entries of the file's tensors.
    """
    module: Any = load_checkpoint(str(base), dtype="float32")
    before = copy.deepcopy(module.state_dict())
    lowered = load_adapter(adapter, TorchBase(module))
    record: dict[str, Any] = {"stored": lowered.parameters, "changed": None, "rank": None, "full": None}
    if lowered.parts.head is not None:
        return record
    try:
        merge(TorchBase(module), lowered)
    except AdapterInvalid:
        return record
    after = module.state_dict()
    changes = {name: after[name] - weight for name, weight in before.items() if not torch.equal(after[name], weight)}
    record["changed"] = sum(int(change.count_nonzero()) for change in changes.values())
    matrices = [change for change in changes.values() if change.dim() == 2]
    if matrices:
        record["rank"] = round(sum(map(_rank, matrices)) / len(matrices), 1)
        record["full"] = round(sum(min(change.shape) for change in matrices) / len(matrices), 1)
    return record


def _rank(change: Tensor) -> int:
    """Singular values above what rounding of the weights to float32 makes."""
    values = torch.linalg.svdvals(change.double())
    return int((values > 1e-4 * values[0]).sum())
