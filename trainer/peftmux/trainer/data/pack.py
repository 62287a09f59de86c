"""Several short rows in one long one, without any of them seeing another."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from peftmux.trainer.data.collate import PADDING
from peftmux.trainer.data.encode import IGNORED


def pack_features(features: Sequence[Mapping[str, Any]], length: int) -> list[dict[str, Any]]:
    """Best fit, longest first: few packs of at most `length` tokens, in an order that depends on nothing but the rows.

    A pack is {"rows": features, "length": tokens}. A row longer than `length` is a pack of its own.
    """
    packs: list[dict[str, Any]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for feature in sorted(features, key=lambda f: -len(f["input_ids"])):
        size = len(feature["input_ids"])
        at = bisect.bisect_left(room, (size, -1))
        if at < len(room):
            free, index = room.pop(at)
            packs[index]["rows"].append(feature)
            packs[index]["length"] += size
        else:
            free, index = length, len(packs)
            packs.append({"rows": [feature], "length": size})
        bisect.insort(room, (free - size, index))
    return packs


@dataclass(frozen=True, slots=True)
class PackedCollator:
    """B packs of at most T tokens: input_ids, labels and position_ids [B, T].

    Positions begin at 0 in every row, which is how transformers tells the rows of a pack apart when there is no
    attention mask. The first token of a row is not predicted: its label is IGNORED.
    """

    def __call__(self, packs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`packs` as `pack_features` gives them."""
        longest = max(pack["length"] for pack in packs)
        ids = np.full((len(packs), longest), PADDING, dtype=np.int64)
        labels = np.full((len(packs), longest), IGNORED, dtype=np.int64)
        positions = np.zeros((len(packs), longest), dtype=np.int64)
        for row, pack in enumerate(packs):
            at = 0
            for feature in pack["rows"]:
                end = at + len(feature["input_ids"])
                ids[row, at:end] = feature["input_ids"]
                labels[row, at + 1 : end] = feature["labels"][1:]
                positions[row, at:end] = np.arange(end - at)
                at = end
            positions[row, at:] = np.arange(longest - at)
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
            "use_cache": False,  # with a cache transformers does not look for packs
        }
