"""What the demo does with a running server, scene by scene: all over gRPC; the batch is read from its metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from peftmux.client import Adapter, AsyncClient, ChatMessage, GenerateOptions, Generation
from peftmux.demo.batch import Batch, watch_batch
from peftmux.demo.process import Running
from peftmux.demo.recipes import Recipe
from peftmux.demo.score import EVALUATION_SEED, HELD_OUT, Score, exact
from peftmux.demo.show import Screen
from peftmux.demo.tasks import Example, examples

ANSWER_TOKENS = 16
CONCURRENT = 96
SHOWN = 8
"""Inputs of the side-by-side table; each is asked of the base and of every adapter at once."""
STORY_TOKENS = 240
LONGEST = 8
"""Characters shown of an answer in a place made for one word."""


async def ask(client: AsyncClient, text: str, adapter: str = "") -> Generation:
    """The greedy answer to one user message."""
    return await client.generate(
        [ChatMessage("user", text)], adapter=adapter, temperature=0.0, max_tokens=ANSWER_TOKENS
    )


async def first_words(client: AsyncClient, screen: Screen) -> None:
    """The base tells a story; says how soon it began."""
    started = time.monotonic()
    tokens, first = 0, 0.0
    prompt = [ChatMessage("user", "Tell me a story about Emma.")]
    async for chunk in client.stream(prompt, temperature=0.7, seed=3, max_tokens=120):
        first = first or time.monotonic() - started
        tokens += len(chunk.token_ids)
        screen.words(chunk.text)
    seconds = time.monotonic() - started
    screen.end_words()
    screen.line(screen.paint(f"  first token after {first * 1e3:.0f} ms, {tokens / seconds:.0f} tokens/s", "dim"))


async def hot_load(client: AsyncClient, recipes: Sequence[Recipe], screen: Screen) -> None:
    """One stream of STORY_TOKENS; at each quarter an adapter is loaded and asked, while the stream goes on.

    Stories end with a sentence that begins "At last". The token "t" stands nowhere else: without it they go on.
    """
    (end,) = (await client.tokenize("t")).token_ids
    tokens, due = 0, list(recipes)
    loads: list[asyncio.Task[None]] = []

    async def load(recipe: Recipe) -> None:
        before, text = tokens, examples(recipe.task, 1, 1, held_out=True)[0].prompt
        adapter = await client.load_adapter(recipe.name, recipe.name)
        answer = await ask(client, text, recipe.name)
        screen.note(_loaded(screen, adapter, f"{text} → {_cut(answer.text)}", tokens - before))

    prompt = [ChatMessage("user", "Tell me a long story about Ben.")]
    options = GenerateOptions(temperature=0.7, seed=1, max_tokens=STORY_TOKENS, logit_bias={end: -100.0})
    async for chunk in client.stream(prompt, **options):
        tokens += len(chunk.token_ids)
        screen.words(chunk.text)
        if due and tokens >= STORY_TOKENS * (len(loads) + 1) // (len(recipes) + 1):
            loads.append(asyncio.create_task(load(due.pop(0))))
    screen.words(" …")
    await asyncio.gather(*loads, *map(load, due))
    screen.end_words()


def _loaded(screen: Screen, adapter: Adapter, answer: str, meanwhile: int) -> str:
    size = f"{adapter.parameters / 1e3:.0f}k parameters at {adapter.applied_sites} sites"
    text = f"  + {adapter.name} ({adapter.kind}) {size}, loaded in {adapter.load_seconds * 1e3:.0f} ms"
    return screen.paint(f"{text}; {answer}; story: +{meanwhile} tokens", "cyan")


async def side_by_side(running: Running, recipes: Sequence[Recipe], screen: Screen) -> None:
    """The same inputs to the base and to every adapter, all at once; who answered what, and who ran beside whom."""
    inputs = [example.prompt for example in examples(recipes[0].task, SHOWN, 2, held_out=True)]
    names = ["", *(recipe.name for recipe in recipes)]
    started = time.monotonic()
    async with watch_batch(running.metrics) as batch:
        asked = [ask(running.client, text, name) for text in inputs for name in names]
        answers = await asyncio.gather(*asked)
    seconds = time.monotonic() - started
    header = ("input", "base", *(f"{recipe.name} {recipe.method}" for recipe in recipes))
    rows, styles = [], []
    for index, text in enumerate(inputs):
        base, *adapted = (answer.text for answer in answers[index * len(names) : (index + 1) * len(names)])
        expected = [recipe.task.answer(text) for recipe in recipes]
        marks = [got == want for got, want in zip(adapted, expected, strict=True)]
        cells = [_cell(got, want) for got, want in zip(adapted, expected, strict=True)]
        rows.append((text, base, *cells))
        styles.append(("", "dim", *("green" if right else "red" for right in marks)))
    screen.table(header, rows, styles)
    _batch_line(screen, batch, recipes)
    tokens = sum(answer.usage.completion_tokens for answer in answers)
    screen.line(f"  {len(answers)} requests, {tokens} tokens in {seconds:.2f} s: {tokens / seconds:.0f} tokens/s")


def _cell(got: str, want: str) -> str:
    """The answer and whether it is right."""
    if got == want:
        return f"{got} ✓"
    return f"{_cut(got)} ✗ {want}"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _batch_line(screen: Screen, batch: Batch, recipes: Sequence[Recipe]) -> None:
    parts = [f"{batch.rows.get('', 0)} base"]
    parts += [f"{batch.rows.get(recipe.name, 0)} {recipe.name} ({recipe.method})" for recipe in recipes]
    screen.line(f"  one batch: {sum(batch.rows.values())} rows = " + " + ".join(parts))


async def held_out_accuracy(client: AsyncClient, recipes: Sequence[Recipe], screen: Screen) -> list[Score]:
    """HELD_OUT inputs per adapter, to it and to the base, in one mixed load."""
    sets = [examples(recipe.task, HELD_OUT, EVALUATION_SEED, held_out=True) for recipe in recipes]
    gate, done, tokens, started = asyncio.Semaphore(CONCURRENT), 0, 0, time.monotonic()
    total = 2 * HELD_OUT * len(recipes)

    async def one(example: Example, adapter: str) -> str:
        nonlocal done, tokens
        async with gate:
            answer = await ask(client, example.prompt, adapter)
        done, tokens = done + 1, tokens + answer.usage.completion_tokens
        screen.progress(f"  {done}/{total} answers")
        return answer.text

    jobs = [
        one(held_out[index], name)
        for index in range(HELD_OUT)
        for recipe, held_out in zip(recipes, sets, strict=True)
        for name in (recipe.name, "")
    ]
    answers = await asyncio.gather(*jobs)
    seconds = time.monotonic() - started
    screen.progress(
        f"  {total} answers, {tokens} tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s", done=True
    )
    width = 2 * len(recipes)
    return [
        Score(recipe, exact(answers[2 * i :: width], held_out), exact(answers[2 * i + 1 :: width], held_out))
        for i, (recipe, held_out) in enumerate(zip(recipes, sets, strict=True))
    ]


def show_scores(scores: Sequence[Score], screen: Screen) -> None:
    header = ("adapter", "kind", "answers with", "base", "adapter")
    rows = [
        (s.recipe.name, s.recipe.method, s.recipe.task.about, f"{s.base:6.1%}", f"{s.adapter:6.1%}") for s in scores
    ]
    styles = [("", "", "dim", "dim", "red" if score.missed else "green") for score in scores]
    screen.table(header, rows, styles)
