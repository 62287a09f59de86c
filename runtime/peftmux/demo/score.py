"""Exact-match accuracy on held-out inputs, and the bounds that the demo holds itself to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peftmux.demo.recipes import Recipe
from peftmux.demo.tasks import Example

ADAPTER_AT_LEAST, BASE_BELOW = 0.90, 0.10
HELD_OUT = 200
"""Inputs per adapter."""
EVALUATION_SEED = 7


@dataclass(frozen=True, slots=True)
class Score:
    """Shares of exact answers, 0 to 1, of an adapter and of the base to the same prompts."""

    recipe: Recipe
    adapter: float
    base: float

    @property
    def missed(self) -> tuple[str, ...]:
        """The bounds that do not hold, in words."""
        words = []
        if self.adapter < ADAPTER_AT_LEAST:
            words.append(f"{self.recipe.name}: expected at least {ADAPTER_AT_LEAST:.0%}, got {self.adapter:.1%}")
        if self.base >= BASE_BELOW:
            words.append(f"{self.recipe.name}: expected the base below {BASE_BELOW:.0%}, got {self.base:.1%}")
        return tuple(words)


def exact(answers: Sequence[str], held_out: Sequence[Example]) -> float:
    """The share of answers that equal the expected text, character by character."""
    right = sum(answer == example.completion for answer, example in zip(answers, held_out, strict=True))
    return right / len(held_out)
