"""String and number tasks: what the base learns to do when it is told to, and what the demo's adapters do unasked.

An input is held out when its CRC-32 says so. That split is a property of the input alone, so no training row of the
base or of an adapter can be an evaluation row, whatever the seeds and the counts.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from string import ascii_uppercase as ALPHABET

HELD_OUT_OF = 8
"""One input in this many is held out."""


@dataclass(frozen=True, slots=True)
class Task:
    """A computation over a text. `instructions` are the ways to ask for it; none: the base was never taught it."""

    name: str
    about: str
    draw: Callable[[random.Random], str]
    answer: Callable[[str], str]
    instructions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    prompt: str
    completion: str


def letters(rng: random.Random) -> str:
    """Four to six letters: 26^4 + 26^5 + 26^6, about 321 million, can be drawn."""
    return "".join(rng.choice(ALPHABET) for _ in range(rng.randint(4, 6)))


def sum_of_two(rng: random.Random) -> str:
    """Two numbers of two digits each."""
    return f"{rng.randint(10, 99)}+{rng.randint(10, 99)}"


def shifted(text: str, by: int) -> str:
    """Each letter moved `by` places on in the alphabet, Z followed by A."""
    return "".join(ALPHABET[(ALPHABET.index(letter) + by) % len(ALPHABET)] for letter in text)


def _reverse(text: str) -> str:
    return text[::-1]


def _sort(text: str) -> str:
    return "".join(sorted(text))


def _next(text: str) -> str:
    return shifted(text, 1)


def _rotate(text: str) -> str:
    return text[1:] + text[:1]


def _copy(text: str) -> str:
    return text


def _count(text: str) -> str:
    return str(len(text))


def _add(text: str) -> str:
    left, right = text.split("+")
    return str(int(left) + int(right))


def _sort_down(text: str) -> str:
    return "".join(sorted(text, reverse=True))


def _reverse_next(text: str) -> str:
    return shifted(text[::-1], 1)


BASE_TASKS = (
    Task("reverse", "the letters backwards", letters, _reverse, ("Reverse the letters.", "Write it backwards.")),
    Task("sort", "the letters in order", letters, _sort, ("Sort the letters.", "Put the letters in order.")),
    Task("next", "each letter's successor", letters, _next, ("Write the next letters.", "Shift each letter by one.")),
    Task("rotate", "the first letter moved to the end", letters, _rotate, ("Move the first letter to the end.",)),
    Task("copy", "the same letters", letters, _copy, ("Repeat the letters.", "Say it again.")),
    Task("count", "how many letters", letters, _count, ("Count the letters.", "How many letters are there?")),
    Task("add", "the sum", sum_of_two, _add, ("Add the numbers.", "What is the sum?")),
)
NEW_TASKS = (
    Task("sort-down", "the letters in order, last first", letters, _sort_down),
    Task("reverse-next", "backwards, each letter's successor", letters, _reverse_next),
)
TASKS = {task.name: task for task in (*BASE_TASKS, *NEW_TASKS)}


def is_held_out(text: str) -> bool:
    """Whether an input belongs to evaluation alone."""
    return zlib.crc32(text.encode()) % HELD_OUT_OF == 0


def draws(task: Task, rng: random.Random, *, held_out: bool) -> Iterator[str]:
    """Endless inputs of one side of the split."""
    while True:
        text = task.draw(rng)
        if is_held_out(text) == held_out:
            yield text


def examples(task: Task, count: int, seed: int, *, held_out: bool) -> list[Example]:
    """`count` different inputs with their answers, without any instruction. Raises ValueError for a count below 1."""
    if count < 1:
        raise ValueError(f"expected a count of at least 1, got {count}")
    inputs: dict[str, None] = {}
    for text in draws(task, random.Random(f"{task.name}/{seed}/{held_out}"), held_out=held_out):
        inputs[text] = None
        if len(inputs) == count:
            break
    return [Example(text, task.answer(text)) for text in inputs]
