"""Training adapters in PEFT's files. What it writes, the runtime serves with the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
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

    options: any other by the name of its flag, e.g. r=16, max_steps=100, max_length=512. Those of the method and of
    transformers' TrainingArguments may also stand together in `config` and `training`, as in {"r": 16}.
    callbacks: transformers' TrainerCallbacks, e.g. for a progress display of one's own.
    Raises TrainerError (DataError, OptionError) before anything is written.
    """
    from peftmux.trainer.methods import get_method, unaliased
    from peftmux.trainer.run.loop import run_training
    from peftmux.trainer.settings.options import RunOptions, build_config
    from peftmux.trainer.settings.split import joined, split
    from peftmux.trainer.settings.value_types import plain_value

    name, given = unaliased(method, {"model": model, "data": data, "out": out, "eval_data": eval_data, **options})
    chosen = get_method(name)
    run, own, arguments = split(chosen.config_class, given)
    own = joined(config or {}, own)
    arguments = {name: plain_value(value) for name, value in joined(training or {}, arguments).items()}
    return run_training(
        chosen, build_config(RunOptions, run), build_config(chosen.config_class, own), arguments, callbacks
    )
