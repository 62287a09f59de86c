"""Training adapters in PEFT's files. What it writes, the runtime serves with the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from peftmux.trainer.errors import DataError, OptionError, TrainerError

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from peftmux.trainer.run.loop import TrainResult

__all__ = ["DataError", "OptionError", "TrainerError", "train"]


def train(
    method: str,
    *,
    model: str | PathLike[str],
    data: str | PathLike[str],
    out: str | PathLike[str],
    eval_data: str | PathLike[str] | None = None,
    config: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **options: Any,
) -> TrainResult:
    """Train an adapter for `model` on the rows of `data` and write it to `out`; what `peftmux train` runs.

    config: the method's own options, e.g. {"r": 16}.
    training: transformers' TrainingArguments, e.g. {"max_steps": 100}.
    callbacks: transformers' TrainerCallbacks, e.g. for a progress display of one's own.
    options: the other fields of `peftmux.trainer.settings.options.RunOptions`, e.g. max_length=512.
    Raises TrainerError (DataError, OptionError) before anything is written.
    """
    from peftmux.trainer.methods import get_method
    from peftmux.trainer.run.loop import run_training
    from peftmux.trainer.settings.options import RunOptions, build_config

    chosen = get_method(method)
    paths = {"model": fspath(model), "data": fspath(data), "out": fspath(out)}
    run = build_config(RunOptions, {**paths, "eval_data": eval_data and fspath(eval_data), **options})
    return run_training(chosen, run, build_config(chosen.config_class, config or {}), training or {}, callbacks)
