"""What a prefix starts from: the keys and values of some text, random ones of their size, or a trained prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from peftmux.adapters.base import KVShape
from peftmux.adapters.errors import AdapterError
from peftmux.adapters.files import read_adapter
from peftmux.adapters.methods.prefix import TENSOR, provisioned_shape, split_prefix
from peftmux.adapters.probing import evaluating
from peftmux.trainer.errors import OptionError
from peftmux.trainer.methods.base import AttachContext

if TYPE_CHECKING:
    from peftmux.trainer.methods.prefix import PrefixConfig


def initial_prefix(model: Any, config: PrefixConfig, context: AttachContext, shapes: Sequence[KVShape]) -> Tensor:
    """In PEFT's layout, [n, layers * 2 * heads * head_dim]."""
    embeddings = _text_prefix(model, _initial_ids(config, context, model), shapes)
    if config.prefix_init == "random":
        generator = torch.Generator().manual_seed(context.seed)
        embeddings = torch.randn(embeddings.shape, generator=generator).to(embeddings.device) * embeddings.std()
    if config.prefix_init_from is not None:
        embeddings = _trained_before(config.prefix_init_from, embeddings)
    return embeddings


def _trained_before(folder: str, like: Tensor) -> Tensor:
    """The prefix in an adapter's folder. Raises OptionError where it has another shape, or is none."""
    try:
        files = read_adapter(folder)
    except AdapterError as error:
        raise OptionError("prefix-init-from", f"{folder}: {error}") from None
    found = files.tensors.get(TENSOR)
    if files.config.get("peft_type") != "PREFIX_TUNING" or found is None or found.shape != like.shape:
        got = "no prefix" if found is None else f"{files.config.get('peft_type')} of {list(found.shape)}"
        raise OptionError("prefix-init-from", f"{folder}: expected a prefix of {list(like.shape)}, got {got}")
    return found.to(like.device, like.dtype)


def _initial_ids(config: PrefixConfig, context: AttachContext, model: Any) -> list[int]:
    """The text or the training data, from the beginning again where it is too short; drawn where there is neither."""
    n = config.num_virtual_tokens or config.default_length(context.task)
    text = config.prefix_init_text
    ids = context.first_ids(n) if text is None else context.text_ids("prefix-init-text", text)
    return context.filled(ids, n, model.config.get_text_config().vocab_size)


def _text_prefix(model: Any, ids: Sequence[int], shapes: Sequence[KVShape]) -> Tensor:
    """What the model itself caches for these tokens at positions 0..n-1 (keys after rotation), in PEFT's layout."""
    cache = DynamicCache()
    with evaluating(model):
        model(input_ids=torch.tensor([list(ids)], device=model.device), past_key_values=cache, use_cache=True)
    widest = provisioned_shape(shapes)
    stored = torch.zeros(len(ids), len(shapes) * 2 * widest.kv_heads * widest.key_dim, device=model.device)
    views = split_prefix(stored, shapes, widest)
    layers: list[Any] = cache.layers
    for layer, keys, values in zip(layers, views.keys, views.values, strict=True):
        keys.copy_(layer.keys[0].transpose(0, 1))
        values.copy_(layer.values[0].transpose(0, 1))
    return stored
