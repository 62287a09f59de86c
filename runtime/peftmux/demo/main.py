"""`peftmux demo`: train three adapters of three kinds, hot-load them into a busy server, ask all in one batch."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from peftmux.demo import BASE
from peftmux.demo.process import ServerFailed, serving
from peftmux.demo.recipes import RECIPES, Recipe
from peftmux.demo.scenes import first_words, held_out_accuracy, hot_load, show_scores, side_by_side
from peftmux.demo.score import ADAPTER_AT_LEAST, BASE_BELOW, HELD_OUT, Score
from peftmux.demo.show import Screen


def main(argv: Sequence[str] | None = None) -> int:
    """0: every accuracy bound holds; 1: one does not; 2: the server failed."""
    parser = argparse.ArgumentParser(prog="peftmux demo", description=__doc__)
    parser.add_argument(
        "--work", type=Path, help="folder that keeps the adapters and the server's log in (default: none kept)"
    )
    args = parser.parse_args(argv)
    screen = Screen()
    with _work_folder(args.work) as work:
        try:
            scores = asyncio.run(play(RECIPES, BASE, work, screen))
        except ServerFailed as error:
            screen.line(screen.paint(f"peftmux demo: {error}", "red"))
            return 2
    missed = [words for score in scores for words in score.missed]
    for words in missed:
        screen.line(screen.paint(f"  missed: {words}", "red"))
    return 1 if missed else 0


async def play(recipes: Sequence[Recipe], base: Path, work: Path, screen: Screen) -> list[Score]:
    """All scenes on one server. Raises ServerFailed, and whatever training or a request raises."""
    started = time.monotonic()
    adapters = work / "adapters"
    adapters.mkdir(parents=True, exist_ok=True)
    screen.line(screen.paint("peftmux demo", "bold") + "  one base model, three adapters of three kinds, one batch")
    async with serving(base, adapters, work / "server.log") as running:
        model = await running.client.model()
        what = f"{model.architecture}, {model.parameters / 1e6:.1f}M parameters, {model.dtype} on {model.device}"
        up = f"up in {time.monotonic() - started:.0f} s at {running.grpc}"
        screen.section("1  The base model speaks", f"{what}; {up}")
        await first_words(running.client, screen)
        screen.section("2  Training", "bare inputs and answers, no instruction; held-out inputs are never seen")
        await asyncio.to_thread(_fit_all, recipes, base, work, screen)
        screen.section("3  Hot-loading", "three LoadAdapter calls while one stream runs")
        await hot_load(running.client, recipes, screen)
        screen.section("4  One batch", "each input to the base and to all three adapters at once")
        await side_by_side(running, recipes, screen)
        bounds = f"exact answers of {HELD_OUT}; adapters at least {ADAPTER_AT_LEAST:.0%}, base below {BASE_BELOW:.0%}"
        screen.section("5  Held-out accuracy", bounds)
        scores = await held_out_accuracy(running.client, recipes, screen)
        show_scores(scores, screen)
    screen.line()
    screen.line(f"server drained and stopped; {time.monotonic() - started:.0f} s in all")
    return scores


def _fit_all(recipes: Sequence[Recipe], base: Path, work: Path, screen: Screen) -> None:
    from peftmux.demo.fit import fit

    started, width = time.monotonic(), max(len(recipe.name) for recipe in recipes)
    for recipe in recipes:
        fit(recipe, base, work, screen, width)
    screen.line(screen.paint(f"  three adapters in {time.monotonic() - started:.0f} s", "dim"))


@contextlib.contextmanager
def _work_folder(path: Path | None) -> Iterator[Path]:
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
        yield path.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="peftmux-demo-") as folder:
        yield Path(folder)


if __name__ == "__main__":
    raise SystemExit(main())
