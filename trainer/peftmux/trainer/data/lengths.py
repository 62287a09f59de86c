"""How long rows are, and how long the longest had better be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SHARE = 0.99
"""Of the rows that the proposed length holds whole."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of rows, in tokens, sorted."""

    sorted: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths:
        """One or more."""
        return cls(tuple(sorted(lengths)))

    def quantile(self, share: float) -> int:
        """The smallest length that this share of the rows has at most."""
        return self.sorted[max(0, math.ceil(share * len(self.sorted)) - 1)]

    def longer(self, length: int) -> int:
        """How many rows."""
        return sum(own > length for own in self.sorted)

    @property
    def proposed(self) -> int:
        return self.quantile(SHARE)

    def text(self) -> str:
        shown = ", ".join(f"{share:.0%} of rows have at most {self.quantile(share)}" for share in (0.5, 0.9, SHARE))
        cut = f"--max-length {self.proposed} cuts {self.longer(self.proposed)} of {len(self.sorted)} rows"
        return f"tokens: {shown}, the longest {self.sorted[-1]}; {cut}"
