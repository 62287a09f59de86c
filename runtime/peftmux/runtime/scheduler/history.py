"""What penalties need of a row's tokens, kept as they come."""

from __future__ import annotations

from array import array
from collections.abc import Iterable


class History:
    """The real tokens of one row by id: which there are, and how often the output has each.

    Owned by its row, which adds a token between steps. A plan that carries it is run before the row draws again.
    """

    __slots__ = ("_known", "_places", "counts", "drawn", "seen")

    def __init__(self, prompt: Iterable[int]) -> None:
        self._known = set(prompt)
        self._places: dict[int, int] = {}
        self.seen = array("q", self._known)
        """Ids of prompt and output, each once."""
        self.drawn = array("q")
        """Ids of the output, each once."""
        self.counts = array("q")
        """How often the output has each of `drawn`."""

    def add(self, token: int) -> None:
        """The output's next."""
        if token not in self._known:
            self._known.add(token)
            self.seen.append(token)
        place = self._places.setdefault(token, len(self.drawn))
        if place == len(self.drawn):
            self.drawn.append(token)
            self.counts.append(0)
        self.counts[place] += 1
