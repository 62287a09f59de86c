"""transformers' TrainingArguments for a run: our defaults under what the user gave."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from peftmux.trainer.errors import OptionError
from peftmux.trainer.settings.argument_checks import check_arguments, check_given, plain
from peftmux.trainer.settings.options import RunOptions

REPORTED = (
    *("seed", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "bf16", "fp16"),
)
"""The arguments a model card names, beside those the user gave."""


def checked_learning_rate(value: object) -> float:
    """Raises OptionError for what is no finite number of 0 or more."""
    try:
        rate = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        rate = math.nan
    if not 0 <= rate < math.inf:
        raise OptionError("learning-rate", f"expected a finite number of 0 or more, got {value!r}")
    return rate


def training_arguments(options: RunOptions, given: Mapping[str, Any]) -> TrainingArguments:
    """Without the method's learning rate, which is the base's to decide. Raises OptionError for an unknown name or a
    refused value."""
    check_launcher(os.environ)
    check_given(options, given)
    values = {**_defaults(options, given), **given, "remove_unused_columns": False}
    if "learning_rate" in given:
        values["learning_rate"] = checked_learning_rate(given["learning_rate"])
    if "warmup_ratio" in values:
        values["warmup_steps"] = _warmup_share(values.pop("warmup_ratio"))
    values.setdefault("output_dir", _output_dir(options, values))
    try:
        args = TrainingArguments(**values)
    except (TypeError, ValueError, ImportError, OSError) as error:
        raise OptionError("training arguments", str(error)) from error
    _check_reports(args.report_to if isinstance(args.report_to, list) else [])  # a list once it is checked
    check_arguments(args)
    if args.n_gpu > 1:
        args._n_gpu = 1  # one process takes one GPU; torchrun or accelerate launch takes them all
    return args


def check_launcher(environ: Mapping[str, str]) -> None:
    """`accelerate launch --cpu --num_processes N` starts one process, and says so nowhere.

    Raises OptionError with what starts N: a run of a smaller batch than was asked for would look like any other.
    """
    ranks = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    asked = "MASTER_ADDR" in environ and environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if asked and not any(name in environ for name in ranks):
        message = "with --cpu starts one process only; several on CPUs: give --multi_gpu in its place, or use torchrun"
        raise OptionError("accelerate launch", message)


def reported_arguments(args: TrainingArguments, given: Mapping[str, Any]) -> dict[str, object]:
    """What a reader needs to train the same again."""
    names = dict.fromkeys([*REPORTED, *(name for name in given if hasattr(args, name) and name != "output_dir")])
    return {name: plain(getattr(args, name)) for name in names}


def folder_beside(out: str, values: Mapping[str, Any]) -> str | None:
    """Where the Trainer writes beside the adapter: checkpoints, and in `runs` what TensorBoard reads. None: nothing."""
    if plain(values.get("save_strategy", "no")) != "no":
        return f"{out}.checkpoints"
    return None if values.get("report_to", "none") in ("none", ["none"], []) else f"{out}.logs"


def _output_dir(options: RunOptions, values: Mapping[str, Any]) -> str:
    if options.resume:
        return f"{options.out}.checkpoints"
    return folder_beside(options.out, values) or tempfile.gettempdir()  # the Trainer wants one that exists


def _check_reports(names: Sequence[str]) -> None:
    """Raises OptionError for a tracker that transformers does not know, or whose library is not installed."""
    known, installed = sorted(INTEGRATION_TO_CALLBACK), get_available_reporting_integrations()
    for name in names:
        if name not in known:
            raise OptionError("report-to", f"expected none, all or some of {', '.join(known)}; got {name!r}")
        if name not in installed:
            raise OptionError("report-to", f"{name} is not installed: pip install {name}, or give --report-to none")


def _defaults(options: RunOptions, given: Mapping[str, Any]) -> dict[str, Any]:
    evaluates = given.get("eval_strategy", "epoch" if options.eval_data else "no")
    values: dict[str, Any] = {
        "logging_steps": 10,
        "logging_nan_inf_filter": False,  # it hides a run that diverges, and reads the loss from the device
        "eval_strategy": evaluates,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
        "use_cpu": not torch.accelerator.is_available(),  # mixed precision on a CPU has to be asked for
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    if plain(given.get("save_strategy")) == "best":
        values["metric_for_best_model"] = "eval_loss"
    if options.early_stopping_patience is not None:  # the best is kept as a checkpoint, so each evaluation saves one
        values |= {
            "save_strategy": evaluates,
            "save_steps": given.get("eval_steps") or 500,
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
        }
    return values


def _warmup_share(value: float) -> float:
    """transformers takes a share of the steps as a `warmup_steps` below 1."""
    if not 0.0 <= value < 1.0:
        raise OptionError("warmup-ratio", f"expected 0 or more and below 1, got {value}")
    return value
