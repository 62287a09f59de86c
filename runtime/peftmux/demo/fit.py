"""Training the demo's adapters with the real trainer, one line of progress each."""

from __future__ import annotations

import contextlib
import io
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from peftmux.demo.recipes import Recipe, write_rows
from peftmux.demo.show import Screen, bar
from peftmux.trainer import train
from peftmux.trainer.run.loop import TrainResult


class ProgressLine(TrainerCallback):
    """Redraws one line of the screen while transformers' Trainer runs."""

    def __init__(self, screen: Screen, label: str) -> None:
        self._screen, self._label = screen, label
        self._loss, self._started = float("nan"), time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._loss = (logs or {}).get("loss", self._loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show(state, done=True)

    def _show(self, state: Any, *, done: bool = False) -> None:
        share, seconds = state.global_step / state.max_steps, time.monotonic() - self._started
        count = f"{state.global_step:>3}/{state.max_steps}"
        text = f"  {self._label}  {bar(share)}  {count}  loss {self._loss:6.4f}  {seconds:4.0f} s"
        self._screen.progress(text, done=done)


def fit(recipe: Recipe, base: Path, work: Path, screen: Screen, width: int) -> TrainResult:
    """Train one adapter into work/adapters/NAME. Raises what the trainer raises; its own words go nowhere."""
    rows = work / f"{recipe.name}.jsonl"
    write_rows(recipe, rows)
    label = f"{recipe.name:<{width}}  {recipe.method:<6}"
    with contextlib.redirect_stderr(io.StringIO()):
        return train(
            recipe.method,
            model=base,
            data=rows,
            out=work / "adapters" / recipe.name,
            config=recipe.config,
            training={**recipe.training, "disable_tqdm": True},
            dtype="float32",
            overwrite=True,
            callbacks=[ProgressLine(screen, label)],
        )
