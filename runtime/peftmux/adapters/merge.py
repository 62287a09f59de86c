"""An adapter written into the weights of its base: `peftmux adapters merge`.

What can be merged exactly is what is linear in the layer's input: low ranks with their scales and biases, sparse and
whole replacements, IA3's scales, norms, embeddings, stacked experts. Everything else is refused by name. Each weight is
computed in float32 and rounded once to the checkpoint's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.parts import (
    EmbeddingPart,
    ExpertsPart,
    InputScale,
    LinearPart,
    LoweredAdapter,
    NormPart,
    ReplacedRows,
    RouterPart,
    SparsePart,
)
from peftmux.adapters.torch_base import TorchBase


def merge(base: TorchBase, adapter: LoweredAdapter) -> None:
    """Change the weights of `base.module` so that the module alone computes what it does with the adapter.

    Everything is checked before the first weight changes. Raises AdapterInvalid with Reason.NOT_MERGEABLE.
    """
    _check(base, adapter)
    parts = list(adapter.parts.placed())
    others = [(place, part) for place, part in parts if not isinstance(part, LinearPart)]
    low_rank = [(place, part) for place, part in parts if isinstance(part, LinearPart)]
    with torch.no_grad(), _Untied(base, adapter.parts.places):
        for place, part in [*others, *low_rank]:
            _MERGES[type(part)](base, place, part)


def _check(base: TorchBase, adapter: LoweredAdapter) -> None:
    parts, reason = adapter.parts, ""
    if parts.prefix is not None or parts.virtual is not None or parts.template:
        reason = "its virtual tokens are no weights of the base"
    elif parts.head is not None:
        reason = "its head is no part of a causal language model"
    elif adapter.invocation:
        reason = "it is active from its invocation tokens on only"
    for place, part in parts.placed():
        reason = reason or _obstacle(base, adapter, place, part)
    if reason:
        raise AdapterInvalid(Reason.NOT_MERGEABLE, f"{adapter.kind} cannot be merged into the base's weights: {reason}")


def _obstacle(base: TorchBase, adapter: LoweredAdapter, place: str, part: Any) -> str:
    """Why this part is no change of weights; "" where it is one."""
    if type(part) not in _MERGES:
        return f"{place} has a {type(part).__name__}, which computes more than a linear layer"
    if getattr(part, "gate", None) is not None:
        return f"{place} has a gate, which changes with its input"
    linear = adapter.parts.linear.get(place)
    if isinstance(part, InputScale) and linear is not None and linear.rank:
        return f"{place} has an input scale and a low rank at once"
    module = base.module.get_submodule(place) if place in base.module_names else None
    has_bias = getattr(module, "bias", None) is not None
    if getattr(part, "bias", None) is not None and not has_bias:
        return f"it has a bias for {place}, where the base's layer has none"
    return ""


class _Untied:
    """Within it the head has a weight of its own, where the adapter changes one of two that are tied.

    On leaving they are tied again if they are still equal, and the config says what is so.
    """

    def __init__(self, base: TorchBase, places: frozenset[str]) -> None:
        self._module: Any = base.module
        self._ties = base.tied and not places.isdisjoint({base.embedding, base.head})

    def __enter__(self) -> None:
        if self._ties:
            head = self._module.get_output_embeddings()
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)

    def __exit__(self, *_: object) -> None:
        if not self._ties:
            return
        table, head = self._module.get_input_embeddings(), self._module.get_output_embeddings()
        if torch.equal(table.weight, head.weight):
            head.weight = table.weight
        else:
            for config in (self._module.config, self._module.config.get_text_config(decoder=True)):
                config.tie_word_embeddings = False


def _write(base: TorchBase, name: str, value: Tensor) -> None:
    """value: float32, in the parameter's own shape."""
    parameter = base.module.get_parameter(name)
    parameter.copy_(value.to(parameter.dtype))


def _write_weight(base: TorchBase, place: str, value: Tensor) -> None:
    """value: [out, in]."""
    conv1d = base.linear_sites[place].conv1d
    _write(base, f"{place}.weight", value.T if conv1d else value)


def _linear(base: TorchBase, place: str, part: LinearPart) -> None:
    weight, bias = base.weight(place).float(), base.bias(place)
    if part.a is not None and part.b is not None:
        weight = weight + part.scale * (part.b @ part.a)
    scale = part.out_scale
    _write_weight(base, place, weight if scale is None else weight * scale.unsqueeze(1))
    if bias is not None:
        new = bias.float() if scale is None else bias.float() * scale
        _write(base, f"{place}.bias", new if part.bias is None else new + part.bias)


def _rows(base: TorchBase, place: str, part: ReplacedRows) -> None:
    weight, bias = base.weight(place).float().clone(), base.bias(place)
    rows = slice(None) if part.ids is None else part.ids
    weight[rows] = part.values
    _write_weight(base, place, weight)
    if bias is not None:
        new = bias.float().clone()
        new[rows] = 0.0 if part.bias is None else part.bias
        _write(base, f"{place}.bias", new)


def _sparse(base: TorchBase, place: str, part: SparsePart) -> None:
    weight = base.weight(place).float().clone()
    weight.index_put_((part.indices[0], part.indices[1]), part.values, accumulate=True)
    _write_weight(base, place, weight)


def _input_scale(base: TorchBase, place: str, part: InputScale) -> None:
    _write_weight(base, place, base.weight(place).float() * part.scale)


def _embedding(base: TorchBase, place: str, part: EmbeddingPart) -> None:
    table = base.embedding_weight().float().clone()
    if part.a is not None and part.b is not None:
        table += part.scale * (part.b @ part.a).T
    if part.out_scale is not None:
        table *= part.out_scale
    if part.rows is not None:
        table[slice(None) if part.ids is None else part.ids] = part.rows
    _write(base, f"{place}.weight", table)


def _norm(base: TorchBase, place: str, part: NormPart) -> None:
    for name, value in (("weight", part.weight), ("bias", part.bias)):
        if value is not None:
            _write(base, f"{place}.{name}", value)


def _stacked(base: TorchBase, place: str, part: ExpertsPart | RouterPart) -> None:
    """[E, out, in], or [E, in, out] where the module says so; a router's [E, in]."""
    weight, delta = base.module.get_parameter(place).float(), part.scale * (part.b @ part.a)
    owner = base.module.get_submodule(place.rpartition(".")[0])
    _write(base, place, weight + (delta.transpose(-2, -1) if getattr(owner, "is_transposed", False) else delta))


_MERGES: Mapping[type, Callable[[TorchBase, str, Any], None]] = {
    LinearPart: _linear,
    ReplacedRows: _rows,
    SparsePart: _sparse,
    InputScale: _input_scale,
    EmbeddingPart: _embedding,
    NormPart: _norm,
    ExpertsPart: _stacked,
    RouterPart: _stacked,
}
