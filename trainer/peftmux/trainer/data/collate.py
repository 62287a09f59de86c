"""Examples to one padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from peftmux.trainer.data.encode import IGNORED

PADDING = 0
"""A token that every base has. No real token sees it and nothing is learned of it, so which one it is makes no
difference; a tokenizer's own may have been added to it without a row in the base's embedding."""


@dataclass(frozen=True, slots=True)
class PaddingCollator:
    """Pads on the right to the longest row. B rows of at most T tokens give input_ids [B, T] and labels [B, K].

    There is no attention mask: attention is causal, so no real token sees the padding behind it, and its labels are
    ignored. With `crop_logits` the batch carries `logits_to_keep` = K, the number of trailing positions whose logits
    some label needs, and the labels of just these; K = T otherwise.
    """

    crop_logits: bool

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`features` as Example.feature() gives them."""
        longest = max(len(f["input_ids"]) for f in features)
        ids = np.full((len(features), longest), PADDING, dtype=np.int64)
        labels = np.full((len(features), longest), IGNORED, dtype=np.int64)
        for row, feature in enumerate(features):
            ids[row, : len(feature["input_ids"])] = feature["input_ids"]
            labels[row, : len(feature["labels"])] = feature["labels"]
        batch: dict[str, Any] = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        batch["use_cache"] = False  # nothing is generated, so no keys and values need to be kept
        if self.crop_logits:
            # The token at i is predicted at i - 1, so the logits from first_label - 1 on are needed.
            keep = longest - min(f["first_label"] for f in features) + 1
            batch["labels"] = batch["labels"][:, longest - keep :]
            batch["logits_to_keep"] = keep
        return batch
