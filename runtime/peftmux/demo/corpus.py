"""What the base is trained on: talk about a small world, tasks under an instruction, inputs without one."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

from peftmux.demo.tasks import BASE_TASKS, Task, draws
from peftmux.demo.world import Chat, conversation, story

ASKING_BACK = "What shall I do with {}?"
"""The base's answer to an input without an instruction: it cannot know which task is meant."""
TASK_SHARE, ASKING_SHARE, TEXT_SHARE = 0.62, 0.05, 0.03
TASK_WEIGHTS = {"reverse": 4, "sort": 5, "next": 4, "rotate": 2, "copy": 1, "count": 1, "add": 3}


Document = Chat | str
"""A conversation whose last message is learnt, or plain text that is learnt from its first token on."""


def documents(seed: int) -> Iterator[Document]:
    """Endless training documents. Held-out inputs never occur in a task (see `tasks.is_held_out`)."""
    rng = random.Random(seed)
    inputs = {task.name: draws(task, rng, held_out=False) for task in BASE_TASKS}
    while True:
        kind = rng.random()
        if kind < TASK_SHARE:
            yield instructed(rng, inputs)
        elif kind < TASK_SHARE + ASKING_SHARE:
            text = next(inputs[_any_task(rng).name])
            yield (("user", text), ("assistant", ASKING_BACK.format(text)))
        elif kind < TASK_SHARE + ASKING_SHARE + TEXT_SHARE:
            yield story(rng, rng.randint(3, 6))
        else:
            yield conversation(rng)


def instructed(rng: random.Random, inputs: Mapping[str, Iterator[str]]) -> Chat:
    """One to four inputs under one system message (whose place an adapter can take), or each with its own order."""
    turns: list[tuple[str, str]] = []
    if rng.random() < 0.6:
        task = _any_task(rng)
        turns.append(("system", rng.choice(task.instructions)))
        for _ in range(rng.randint(1, 4)):
            text = next(inputs[task.name])
            turns += [("user", text), ("assistant", task.answer(text))]
        return tuple(turns)
    for _ in range(rng.randint(1, 3)):
        task = _any_task(rng)
        text = next(inputs[task.name])
        turns += [("user", f"{rng.choice(task.instructions)} {text}"), ("assistant", task.answer(text))]
    return tuple(turns)


def _any_task(rng: random.Random) -> Task:
    return rng.choices(BASE_TASKS, [TASK_WEIGHTS[task.name] for task in BASE_TASKS])[0]
