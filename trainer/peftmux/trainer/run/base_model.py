"""Loading the base model and its tokenizer."""

from __future__ import annotations

import sys
from typing import Any

from transformers.utils import logging

from peftmux.adapters.checkpoint import checkpoint_config, load_checkpoint, load_tokenizer
from peftmux.trainer.errors import OptionError
from peftmux.trainer.settings.options import RunOptions


def load_base(options: RunOptions) -> tuple[Any, Any]:
    """(model, tokenizer), the model on the CPU. Raises OptionError where the name gives no causal LM."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    extra: dict[str, Any] = {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
    try:
        checkpoint_config(options.model)
        tokenizer = load_tokenizer(options.model)  # before the weights, which take long
        if tokenizer.eos_token_id is None and options.append_eos:
            raise OptionError("append-eos", "the tokenizer has no end-of-sequence token; give --no-append-eos")
        model = load_checkpoint(options.model, quantization=options.quantization, dtype=options.dtype, **extra)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        message = f"{options.model} cannot be loaded as a causal LM with its tokenizer: {error}"
        raise OptionError("model", message) from error
    return model, tokenizer


def longest_row(model: Any, reserved: int) -> int:
    """Tokens a row may have when `reserved` positions are taken by the adapter."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) - reserved if limit else 1 << 30
