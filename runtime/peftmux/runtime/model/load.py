"""Loads a transformers causal LM, fits it with paged attention and adapter sites, and proves it unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftmux.adapters.checkpoint import load_checkpoint, load_tokenizer
from peftmux.adapters.quantised import by_weight_only
from peftmux.kernels.dense import choose_dense
from peftmux.runtime.errors import UnsupportedModel
from peftmux.runtime.model.attention import IMPLEMENTATION
from peftmux.runtime.model.discover import discover
from peftmux.runtime.model.loaded import Anatomy, LoadedModel
from peftmux.runtime.model.rotary import pin_frequencies
from peftmux.runtime.model.step import StepState
from peftmux.runtime.model.swaps import Swapper
from peftmux.runtime.model.verify import reference_logits, verify


def load_model(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    context_length: int | None = None,
    quantization: str | None = None,
) -> LoadedModel:
    """From a folder or a hub id. dtype None is the checkpoint's own; quantization: None, or one of QUANTISATIONS.

    Raises UnsupportedModel.
    """
    try:
        module = load_checkpoint(
            name, device=device, quantization=quantization, dtype=dtype or "auto", attn_implementation="eager"
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UnsupportedModel(f"cannot load the base model {name!r}: {error}") from error
    return fit_model(module, _tokenizer(name), name, context_length)


def _tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """None where the model has none: such a model is served by token ids alone."""
    try:
        return load_tokenizer(name)
    except (OSError, ValueError, KeyError):
        return None


def fit_model(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    name: str,
    context_length: int | None = None,
) -> LoadedModel:
    """Take over a module that runs with eager attention: swap its layers and prove that it computes the same."""
    module.eval().requires_grad_(False)
    by_weight_only(module)
    discovery = discover(module)
    context_length = context_length or _context_length(module)
    pin_frequencies(module, context_length)
    expected = reference_logits(module)
    anatomy = Anatomy.of(module)
    step = StepState()
    swapper = Swapper(
        module, discovery.token_linears, discovery.token_norms, choose_dense(module.device, module.dtype), step
    )
    swapper.run()
    swapper.swap_branches(anatomy.branches)
    swapper.watch_stream(anatomy.stream_layers)
    module.set_attn_implementation(IMPLEMENTATION)
    model = LoadedModel(module, tokenizer, name, discovery.layers, anatomy, swapper, step, context_length)
    verify(model, expected)
    return model


def _context_length(module: nn.Module) -> int:
    config: Any = module.config
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(length, int):
        raise UnsupportedModel(f"expected max_position_embeddings in the config of {type(module).__name__}, got none")
    return length
