"""Tokens by the experts that they go to, in an order in which each weight is read once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_SLOTS = 1 << 20
"""More than there are adapter slots."""


class Group(NamedTuple):
    """Neighbouring pairs start .. end - 1 of one expert and one adapter slot."""

    expert: int
    slot: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """P = t * k pairs of a token and one of its experts; those of one expert and one adapter stand side by side."""

    groups: list[Group]
    order: Tensor
    """[P] int64: which pair of [t, k], flattened, stands here."""
    each: int
    """k."""

    @classmethod
    def of(cls, experts: Tensor, slots: Tensor | int) -> Pairs:
        """experts: [t, k], slots: [t], the adapter of each token, or one of all. On a GPU this waits for it, once."""
        owners = slots.unsqueeze(1) if isinstance(slots, Tensor) else slots
        keys = (experts * _SLOTS + owners).flatten()
        order = keys.argsort(stable=True)
        found = torch.stack(keys[order].unique_consecutive(return_counts=True)).tolist()
        groups, start = [], 0
        for key, count in zip(*found, strict=True):
            expert, slot = divmod(key, _SLOTS)
            groups.append(Group(expert, slot, start, start + count))
            start += count
        return cls(groups, order, experts.shape[1])

    @property
    def tokens(self) -> Tensor:
        """[P] int64: the token of each pair."""
        return self.order // self.each

    def by_token(self, values: Tensor) -> Tensor:
        """[P, n] -> [t, n], each the sum of its own pairs in a fixed order."""
        in_order = torch.empty_like(values).index_copy_(0, self.order, values)
        return in_order.view(-1, self.each, values.shape[1]).sum(1)
