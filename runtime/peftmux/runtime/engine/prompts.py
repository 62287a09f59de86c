"""The prompts that `Engine` takes: one or several, as text or as token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import SupportsIndex, cast

from peftmux.runtime.errors import InvalidRequest

Prompt = str | Sequence[int]
"""Text, encoded with the tokenizer's special tokens, or token ids, taken as they are."""
Prompts = list[str] | tuple[str, ...] | Sequence[Sequence[int]]


def is_one(prompt: Prompt | Prompts) -> bool:
    return isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], SupportsIndex))


def with_adapters(prompt: Prompt | Prompts, adapter: str | Sequence[str]) -> Iterator[tuple[Prompt, str]]:
    """Each prompt with the name of its adapter. InvalidRequest where there are not as many names as prompts."""
    if is_one(prompt):
        if not isinstance(adapter, str):
            raise InvalidRequest("adapter", f"expected one name for one prompt, got {len(adapter)}")
        yield cast("Prompt", prompt), adapter
        return
    prompts = cast("Sequence[Prompt]", prompt)
    names = [adapter] * len(prompts) if isinstance(adapter, str) else list(adapter)
    if len(names) != len(prompts):
        raise InvalidRequest("adapter", f"expected one name, or one for each of {len(prompts)}, got {len(names)}")
    yield from zip(prompts, names, strict=True)
