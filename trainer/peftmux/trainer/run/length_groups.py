"""Batches of rows of like length, in an order that any epoch can be begun with."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class EpochLengthSampler(LengthGroupedSampler):
    """An epoch's order is drawn from (seed, epoch) alone, not from torch's global state, so that a run which goes on
    within it sees the same rows as one that was never cut off."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(random.Random(f"{self.seed} {self.epoch}").getrandbits(63))
        order: Iterator[int] = super().__iter__()  # type: ignore[no-untyped-call]
        return order
