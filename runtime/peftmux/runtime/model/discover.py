"""Finds a model's attention layers, and refuses what the paged attention cannot honour."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftmux.adapters.base import KVShape
from peftmux.adapters.norms import norm_layers
from peftmux.adapters.quantised import is_linear
from peftmux.runtime.errors import UnsupportedModel

_DISCOVERY = "peftmux_discovery"
_REGISTERED = threading.Lock()
"""The interface's table is the process's: two models that load at once must not find each other's layers."""
_HONOURED = {"scaling", "sliding_window", "softcap", "s_aux"}
_IRRELEVANT = {
    "dropout": "evaluation only",
    "position_ids": "already in the rotated queries and keys",
    "cache_position": "already in the rotated queries and keys",
    "use_cache": "the cache is ours",
    "output_attentions": "not offered",
    "output_hidden_states": "not offered",
    "output_router_logits": "not offered",
    "return_dict": "form of the result",
    "logits_to_keep": "read by the output projection",
    "is_causal": "checked below",
    "layer_idx": "a name",
}


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One attention module in call order, with what one token costs it in the cache."""

    module: nn.Module
    kv: KVShape
    query_heads: int
    windowed: bool
    """It sees only the tokens of a sliding window."""


class _Recorder:
    """Stands in for attention during one forward: notes who calls, answers zeros of the right shape."""

    def __init__(self) -> None:
        self.layers: list[AttentionLayer] = []

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        name = type(module).__name__
        if mask is not None:
            raise UnsupportedModel(f"{name} passes its own attention mask, which paged attention cannot honour")
        unknown = {k for k, v in kwargs.items() if v is not None} - _HONOURED - _IRRELEVANT.keys()
        if unknown or kwargs.get("is_causal") is False:
            raise UnsupportedModel(f"{name} asks for attention options that are not served: {sorted(unknown)}")
        if any(layer.module is module for layer in self.layers):
            raise UnsupportedModel(f"{name} attends more than once a step with one module")
        windowed = kwargs.get("sliding_window") is not None
        batch, heads, tokens, _ = query.shape
        shape = KVShape(key.shape[1], key.shape[3], value.shape[3])
        self.layers.append(AttentionLayer(module, shape, heads, windowed))
        return query.new_zeros(batch, tokens, heads, value.shape[3]), None


@dataclass(frozen=True, slots=True)
class Discovery:
    layers: tuple[AttentionLayer, ...]
    """In call order."""
    token_linears: frozenset[str]
    """Linear layers called once with a row for each token: those an adapter's rows can be told apart in."""
    token_norms: Mapping[str, int]
    """Normalisation layers called once with a row for each token, and the dimension along which the tokens lie."""


def discover(model: PreTrainedModel) -> Discovery:
    """Run a few tokens through the model to find its attention layers and token-wise linear layers.

    Families that never call the attention interface keep their own attention silently, so layers are counted.
    Raises UnsupportedModel.
    """
    tokens = _token_count(model)
    recorder, calls, norms = _Recorder(), _LinearCalls(model, tokens), _NormCalls(model, tokens)
    before = model.config._attn_implementation
    positions = torch.arange(tokens, device=model.device).unsqueeze(0)
    ids = positions % model.config.get_text_config().vocab_size
    with _REGISTERED:
        AttentionInterface.register(_DISCOVERY, recorder)
        model.set_attn_implementation(_DISCOVERY)
        try:
            with torch.inference_mode():
                model(input_ids=ids, position_ids=positions, use_cache=False)
        finally:
            calls.remove()
            norms.remove()
            model.set_attn_implementation(before)
    expected = model.config.get_text_config().num_hidden_layers
    if len(recorder.layers) != expected:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be served: expected {expected} layers to go through transformers' "
            f"attention interface, got {len(recorder.layers)}"
        )
    return Discovery(tuple(recorder.layers), calls.token_wise(), norms.token_wise())


def _token_count(model: PreTrainedModel) -> int:
    """A few tokens: as many as there is nothing else of, so that their dimension is known by its size."""
    config = model.config.get_text_config()
    sizes = {value for value in config.to_dict().values() if isinstance(value, int)}
    return next(count for count in (5, 7, 11, 13, 17, 19) if count not in sizes)


class _LinearCalls:
    """Counts, for every linear layer, how often it is called and with how many rows."""

    def __init__(self, model: nn.Module, tokens: int) -> None:
        self._tokens = tokens
        self._rows: dict[str, list[int]] = {}
        self._hooks = [
            module.register_forward_pre_hook(partial(self._note, name))
            for name, module in model.named_modules()
            if is_linear(module) or type(module) is Conv1D
        ]

    def _note(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        self._rows.setdefault(name, []).append(x.numel() // x.shape[-1])

    def token_wise(self) -> frozenset[str]:
        # routed experts see a part of the tokens, by accident perhaps all of these few
        return frozenset(n for n, rows in self._rows.items() if rows == [self._tokens] and ".experts." not in n)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


class _NormCalls:
    """Notes the shapes that every normalisation layer is called with."""

    def __init__(self, model: nn.Module, tokens: int) -> None:
        self._tokens = tokens
        self._shapes: dict[str, list[tuple[int, ...]]] = {}
        self._hooks = [
            norm.register_forward_pre_hook(partial(self._note, name)) for name, norm in norm_layers(model).items()
        ]

    def _note(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._shapes.setdefault(name, []).append(tuple(args[0].shape[:-1]))

    def token_wise(self) -> dict[str, int]:
        once = {name: shapes[0] for name, shapes in self._shapes.items() if len(shapes) == 1}
        return {name: shape.index(self._tokens) for name, shape in once.items() if shape.count(self._tokens) == 1}

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
