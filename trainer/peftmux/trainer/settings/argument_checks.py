"""What transformers takes for a training argument and would stumble over, or pass over, once the run has begun."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from peftmux.trainer.errors import OptionError
from peftmux.trainer.settings.options import NEXT_TOKEN, RunOptions

_MOST = float(2**32 - 1)
_AT_LEAST_1 = (1.0, math.inf)
_AT_LEAST_0 = (0.0, math.inf)
_RANGES: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _AT_LEAST_1),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "save_total_limit"), _AT_LEAST_1),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "adam_epsilon", "neftune_noise_alpha"), _AT_LEAST_0),
    **dict.fromkeys(("warmup_steps", "eval_delay", "dataloader_num_workers"), _AT_LEAST_0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), (0.0, 1.0)),
    **dict.fromkeys(("seed", "data_seed"), (0.0, _MOST)),
}
"""From, and up to; what is not given may be None."""
_NOT_OFFERED: Mapping[str, str] = {
    "push_to_hub": "is not offered: `hf upload REPOSITORY FOLDER` puts a finished adapter on the Hub",
    "bf16_full_eval": "would round what is trained before it is written: give --bf16",
    "fp16_full_eval": "would round what is trained before it is written: give --fp16",
    "use_liger_kernel": "is not offered: its layers and losses replace those that adapters act on",
}
_WHOLE_MODEL = ("galore", "apollo", "lomo", "layerwise")
"""Optimisers that project or update the base's whole weights, of which nothing is trained."""


def check_given(options: RunOptions, given: Mapping[str, Any]) -> None:
    """What can be seen before transformers looks at it. Raises OptionError."""
    for name, why in _NOT_OFFERED.items():
        if given.get(name):
            raise OptionError(_flag(name), why)
    for name in given:
        if name.startswith("hub_") and given[name]:
            raise OptionError(_flag(name), _NOT_OFFERED["push_to_hub"])
    for name, (low, high) in _RANGES.items():
        if given.get(name) is not None:
            _check_number(name, given[name], low, high)
    _check_length(given)
    if any(word in str(given.get("optim", "")) for word in _WHOLE_MODEL):
        message = f"{given['optim']} is for training whole weights: an adapter's tensors are small as they are"
        raise OptionError("optim", message)
    smoothing = given.get("label_smoothing_factor")
    if smoothing and (options.loss != NEXT_TOKEN or options.task != "generation"):
        what = f"--loss {options.loss}" if options.loss != NEXT_TOKEN else f"--task {options.task}"
        raise OptionError("label-smoothing-factor", f"smooths over the next tokens: not for {what}")
    if options.early_stopping_patience and plain(given.get("eval_strategy")) == "no":
        raise OptionError("early-stopping-patience", "stops by evaluations: not with --eval-strategy no")
    if options.packing and given.get("train_sampling_strategy") == "batch_rebalance":
        raise OptionError("train-sampling-strategy", "batch_rebalance weighs rows by length: not with --packing")
    if not options.eval_data:
        _check_no_evaluation(given)


def check_arguments(args: TrainingArguments) -> None:
    """What only transformers' reading shows. Raises OptionError."""
    for kind in ("logging", "eval", "save"):
        steps = getattr(args, f"{kind}_steps")
        if plain(getattr(args, f"{kind}_strategy")) == "steps" and not 0 < steps < math.inf:
            raise OptionError(f"{kind}-steps", f"expected more than 0, got {steps:g}")
    if args.fp16 and args.device.type == "cpu":
        raise OptionError("fp16", "is for GPUs, on a CPU nothing would be rounded: give --bf16")
    metric = args.metric_for_best_model
    if metric not in (None, "loss", "eval_loss"):
        raise OptionError("metric-for-best-model", f"expected eval_loss, which is all that is measured, got {metric!r}")
    if args.dataloader_prefetch_factor is not None and not (
        args.dataloader_num_workers and args.dataloader_prefetch_factor > 0
    ):
        message = f"expected 1 or more, with --dataloader-num-workers; got {args.dataloader_prefetch_factor}"
        raise OptionError("dataloader-prefetch-factor", message)
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if not isinstance(getattr(args, name, None) or {}, dict):
            raise OptionError(_flag(name), f"expected a JSON object, got {getattr(args, name)!r}")
    _try_optimizer(args)


def _try_optimizer(args: TrainingArguments) -> None:
    """One of the kind asked for, of a tensor that nobody needs: its library, its options and its schedule."""
    if getattr(args, "deepspeed", None):
        return  # has optimisers of its own
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **options)
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        raise OptionError("optim", f"{plain(args.optim)} cannot be had: {error}") from None
    kind, chosen = plain(args.lr_scheduler_type), args.lr_scheduler_kwargs
    if chosen is not None and not isinstance(chosen, dict):
        raise OptionError("lr-scheduler-kwargs", f"expected a JSON object, got {chosen!r}")
    try:
        get_scheduler(kind, optimizer, num_warmup_steps=1, num_training_steps=10, scheduler_specific_kwargs=chosen)
    except (ImportError, ValueError, TypeError) as error:
        raise OptionError("lr-scheduler-type", f"{kind} cannot be had: {error}") from None


def _check_number(name: str, value: object, low: float, high: float) -> None:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high:
        wanted = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:.0f}"
        raise OptionError(_flag(name), f"expected {wanted}, got {value}")


def _check_length(given: Mapping[str, Any]) -> None:
    """transformers reads -1 steps as: as many as the epochs have."""
    steps = given.get("max_steps", -1)
    if steps != -1 and not (isinstance(steps, int) and steps >= 1):
        raise OptionError("max-steps", f"expected 1 or more, got {steps}")
    epochs = given.get("num_train_epochs", 1)
    if not (isinstance(epochs, int | float) and 0 < epochs < math.inf):
        raise OptionError("num-train-epochs", f"expected more than 0, got {epochs}")


def _check_no_evaluation(given: Mapping[str, Any]) -> None:
    asked = {
        "eval-strategy": plain(given.get("eval_strategy", "no")) != "no",
        "eval-on-start": bool(given.get("eval_on_start")),
        "load-best-model-at-end": bool(given.get("load_best_model_at_end")),
        "save-strategy": plain(given.get("save_strategy", "no")) == "best",
    }
    for name, wanted in asked.items():
        if wanted:
            raise OptionError(name, "needs rows to evaluate on: give --eval-data")


def plain(choice: Any) -> Any:
    """A member of one of transformers' enumerations as what is written for it; anything else as it is."""
    return getattr(choice, "value", choice)


def _flag(name: str) -> str:
    return name.replace("_", "-")
