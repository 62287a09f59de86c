"""Where the virtual tokens of a template stand in a prompt. The one definition, for serving and for training."""

from __future__ import annotations

from collections.abc import Sequence

from peftmux.adapters.parts import TokenGroup


class PromptTooShort(ValueError):
    """`least`: how many tokens a group's place takes."""

    def __init__(self, least: int, prompt: int) -> None:
        super().__init__(f"expected a prompt of at least {least} tokens for the template, got {prompt}")
        self.least = least


def inserts(template: Sequence[TokenGroup], prompt: int) -> list[tuple[int, range]]:
    """(place in a prompt of so many tokens, which of the template's virtual tokens), in the order in which they stand.

    Of groups that meet, those with at >= 0 come first. Raises PromptTooShort.
    """
    found, first = [], 0
    for group in template:
        index = group.at if group.at >= 0 else prompt + 1 + group.at
        if not 0 <= index <= prompt:
            raise PromptTooShort(group.at if group.at >= 0 else -1 - group.at, prompt)
        found.append((index, group.at < 0, range(first, first + group.tokens)))
        first += group.tokens
    return [(index, tokens) for index, _, tokens in sorted(found, key=lambda insert: insert[:2])]
