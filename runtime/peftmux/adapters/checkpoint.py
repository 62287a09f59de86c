"""Loads a base model's checkpoint whole, or not at all, and its tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peftmux.adapters.quantised import is_quantised, quantisation_config, weights_stay_as_stored
from peftmux.adapters.stored import accept_stored, made_plain, strange_weights


class UnusableCheckpoint(ValueError):
    """Not a decoder-only causal LM whose every weight is in the checkpoint."""


def load_checkpoint(
    name: str, *, device: torch.device | None = None, quantization: str | None = None, **options: Any
) -> PreTrainedModel:
    """A causal LM from a folder or a hub id, on `device`; `options` as `from_pretrained` takes them.

    quantization: one of QUANTISATIONS, to quantise a plain checkpoint while it is loaded.

    transformers fills weights that a checkpoint lacks with random numbers and goes on; here they are an error, as is a
    checkpoint quantised in a form that is not known here. Raises UnusableCheckpoint, ImportError where a form's library
    is missing, or what transformers raises (OSError, ValueError, RuntimeError).
    """
    config: Any = checkpoint_config(name)
    try:
        quantised = accept_stored(config, quantization) or quantization
    except ValueError as error:
        raise UnusableCheckpoint(f"{name!r}: {error}") from error
    if quantization is not None:
        dtype = options.get("dtype")
        compute = dtype if isinstance(dtype, torch.dtype) else config.dtype or torch.float32
        options["quantization_config"] = quantisation_config(quantization, compute)
    if quantised:  # quantised weights are made where they stay
        options["device_map"] = {"": device or torch.device("cpu")}
    loading: Any = AutoModelForCausalLM.from_pretrained(
        name, config=config, trust_remote_code=False, output_loading_info=True, **options
    )
    model: PreTrainedModel
    model, info = loading
    missing = sorted(info["missing_keys"])
    if missing:
        raise UnusableCheckpoint(
            f"expected every weight of {type(model).__name__} in {name!r}, {len(missing)} missing: "
            + ", ".join(missing[:4])
            + (", ..." if len(missing) > 4 else "")
        )
    weights_stay_as_stored(model)
    if quantised and not any(is_quantised(layer) for layer in model.modules()):
        made_plain(model)
    if strange := strange_weights(model):
        raise UnusableCheckpoint(f"expected plain or known quantised weights in {name!r}, {strange[0]} is neither")
    if quantization and not any(is_quantised(layer) for layer in model.modules()):
        raise UnusableCheckpoint(f"expected linear layers that can be held in {quantization}, {name!r} has none")
    return model if quantised or device is None else model.to(device)  # type: ignore[arg-type]


def checkpoint_config(name: str) -> PretrainedConfig:
    """Raises UnusableCheckpoint for what cannot be a decoder-only LM, or what transformers raises."""
    if _looks_like_path(name) and not Path(name).is_dir():
        raise UnusableCheckpoint(f"expected a folder or a hub id, found no folder {name!r}")
    config: PretrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if config.is_encoder_decoder:
        raise UnusableCheckpoint(f"expected a decoder-only causal LM, {name!r} is an encoder-decoder")
    return config


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Raises UnusableCheckpoint where there is none, or what transformers raises.

    Of some kinds transformers makes one of special tokens alone where there is no file of one.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if len(tokenizer) <= len(getattr(tokenizer, "get_added_vocab", dict)()):
        raise UnusableCheckpoint(f"expected a tokenizer with a vocabulary, found no file of one in {name!r}")
    return tokenizer


def _looks_like_path(name: str) -> bool:
    """A hub id is "name" or "organisation/name"."""
    return name.startswith((".", "~", os.sep)) or name.count(os.sep) > 1
