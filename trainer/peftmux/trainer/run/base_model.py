"""Loading the base model and its tokenizer."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from transformers.utils import logging

from peftmux.adapters.checkpoint import checkpoint_config, load_checkpoint, load_tokenizer
from peftmux.trainer.errors import OptionError
from peftmux.trainer.settings.options import RunOptions

_SPREAD = ("fsdp", "deepspeed")
"""Training arguments with which several devices share one model: it is dealt out to them from the CPU."""


def load_base(options: RunOptions, training: Mapping[str, Any]) -> tuple[Any, Any]:
    """(model, tokenizer), the model where a run with these TrainingArguments will have it, so that what comes before
    the first step is computed there, too. Raises OptionError where the name gives no causal LM."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    extra: dict[str, Any] = {"device": training_device(training), "dtype": options.dtype}
    if options.attn_implementation:
        extra["attn_implementation"] = options.attn_implementation
    try:
        checkpoint_config(options.model)
        tokenizer = load_tokenizer(options.model)  # before the weights, which take long
        if tokenizer.eos_token_id is None and options.append_eos:
            raise OptionError("append-eos", "the tokenizer has no end-of-sequence token; give --no-append-eos")
        model = load_checkpoint(options.model, quantization=options.quantization, **extra)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        message = f"{options.model} cannot be loaded as a causal LM with its tokenizer: {error}"
        raise OptionError("model", message) from error
    return model, tokenizer


def training_device(training: Mapping[str, Any]) -> torch.device | None:
    """This process's, as transformers' Trainer chooses it; None: the CPU."""
    spread = any(training.get(name) or _is_set(f"ACCELERATE_USE_{name.upper()}") for name in _SPREAD)
    if training.get("use_cpu") or _is_set("ACCELERATE_USE_CPU") or spread or not torch.accelerator.is_available():
        return None
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    local = max(int(os.environ.get("LOCAL_RANK", "0")), 0)
    return torch.device(accelerator.type, local % torch.accelerator.device_count())


def _is_set(name: str) -> bool:
    """In the words that `accelerate launch` says it with."""
    return os.environ.get(name, "").lower() in ("true", "1", "yes", "on")


def longest_row(model: Any, reserved: int) -> int:
    """Tokens a row may have when `reserved` positions are taken by the adapter."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) - reserved if limit else 1 << 30
