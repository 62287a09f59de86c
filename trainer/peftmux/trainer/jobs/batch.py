"""Micro-batches of several jobs as one, and its logits by job again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from peftmux.trainer.data.collate import PADDING
from peftmux.trainer.data.encode import IGNORED


@dataclass(frozen=True, slots=True)
class JoinedBatch:
    """Rows of several jobs, filled up on the right to the longest. `rows` are counted by job, in order."""

    input_ids: Tensor
    """[B, T]."""
    labels: Tensor
    """[B, K] of the last K positions, IGNORED where nothing is learned."""
    rows: tuple[int, ...]
    cropped: bool
    """Only those positions' logits are computed."""

    def inputs(self) -> dict[str, Any]:
        """What the model is called with."""
        keep = {"logits_to_keep": self.labels.shape[1]} if self.cropped else {}
        return {"input_ids": self.input_ids, "labels": self.labels, **keep}


def join(batches: Sequence[Mapping[str, Any]]) -> JoinedBatch:
    """Each as the collator made it: input_ids [B_j, T_j], labels [B_j, K_j] of the last K_j positions."""
    width = max(batch["input_ids"].shape[1] for batch in batches)
    first = min(batch["input_ids"].shape[1] - batch["labels"].shape[1] for batch in batches)
    ids, labels = [], []
    for batch in batches:
        length = batch["input_ids"].shape[1]
        missing = length - batch["labels"].shape[1]
        ids.append(pad(batch["input_ids"], (0, width - length), value=PADDING))
        labels.append(pad(batch["labels"], (missing - first, width - length), value=IGNORED))
    cropped = "logits_to_keep" in batches[0]  # one model's, so all or none
    return JoinedBatch(torch.cat(ids), torch.cat(labels), tuple(len(part) for part in ids), cropped)
