"""Tasks and text: equal for equal seeds, held-out inputs disjoint from all training text, answers as defined."""

from __future__ import annotations

import itertools
import random

import pytest

from peftmux.demo.corpus import documents
from peftmux.demo.tasks import BASE_TASKS, HELD_OUT_OF, TASKS, examples, is_held_out, letters


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("reverse", "KPXAT", "TAXPK"),
        ("sort", "KPXAT", "AKPTX"),
        ("next", "AYZB", "BZAC"),
        ("rotate", "KPXAT", "PXATK"),
        ("copy", "KPXAT", "KPXAT"),
        ("count", "KPXAT", "5"),
        ("add", "37+65", "102"),
        ("sort-down", "KPXAT", "XTPKA"),
        ("reverse-next", "KPXAZ", "ABYQL"),
    ],
)
def test_answers(task: str, text: str, answer: str) -> None:
    assert TASKS[task].answer(text) == answer


def test_examples_depend_on_the_seed_alone() -> None:
    task = TASKS["reverse"]
    assert examples(task, 50, 3, held_out=True) == examples(task, 50, 3, held_out=True)
    assert examples(task, 50, 3, held_out=True) != examples(task, 50, 4, held_out=True)
    assert len({example.prompt for example in examples(task, 500, 3, held_out=False)}) == 500


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_split_is_disjoint_by_the_input_alone(task: object) -> None:
    train = {example.prompt for example in examples(task, 400, 1, held_out=False)}  # type: ignore[arg-type]
    test = {example.prompt for example in examples(task, 200, 2, held_out=True)}  # type: ignore[arg-type]
    assert not train & test
    assert not any(is_held_out(text) for text in train)
    assert all(is_held_out(text) for text in test)


def test_held_out_share_of_all_inputs() -> None:
    rng = random.Random(0)
    share = sum(is_held_out(letters(rng)) for _ in range(8000)) / 8000
    assert share == pytest.approx(1 / HELD_OUT_OF, abs=0.015)


def test_no_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        examples(TASKS["reverse"], 0, 1, held_out=True)


def test_corpus_is_deterministic_and_holds_no_held_out_input() -> None:
    first = list(itertools.islice(documents(5), 3000))
    assert first == list(itertools.islice(documents(5), 3000))
    assert first[:10] != list(itertools.islice(documents(6), 10))
    instructions = {text for task in BASE_TASKS for text in task.instructions}
    inputs = set()
    for document in first:
        for role, content in () if isinstance(document, str) else document:
            words = content.split()
            if role == "user" and (len(words) == 1 or " ".join(words[:-1]) in instructions):
                inputs.add(words[-1])
    inputs = {text for text in inputs if text.isupper() or "+" in text}
    assert len(inputs) > 1500
    assert not any(is_held_out(text) for text in inputs)
