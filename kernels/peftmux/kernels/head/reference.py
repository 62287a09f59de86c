"""A classification head on final hidden states. The one definition.

h_0 = x;   h_i = act(W_i h_(i-1) + b_i) for the hidden layers;   logits = W h_n + b

PEFT saves heads of one linear layer (transformers' `score` or `classifier`), AdapterHub also such with hidden layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "gelu": functional.gelu,
    "relu": torch.relu,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}
"""By name; "" is none."""


@dataclass(frozen=True, slots=True)
class HeadLayer:
    """One linear layer. weight: [out, in], bias: [out] or None."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """A head with C labels on states of width D.

    A "sequence" head reads the last token of a prompt that is no padding (see `reads_padding`), a "token" head all.
    """

    kind: Literal["sequence", "token"]
    output: HeadLayer
    """weight: [C, width of the layer before it, D without one]."""
    labels: tuple[str, ...]
    """C names."""
    hidden: tuple[HeadLayer, ...] = ()
    activation: str = ""
    """After each hidden layer; a key of ACTIVATIONS."""
    reads_padding: bool = False
    """A "sequence" head reads the last token, padding or not: where ids are fed as embeddings, as virtual tokens are,
    transformers does not see which are padding."""


def apply_head(states: Tensor, head: Head) -> Tensor:
    """The definition above. states: [N, D] -> logits [N, C], computed in the head's dtype."""
    x = states.to(head.output.weight.dtype)
    for layer in head.hidden:
        x = ACTIVATIONS[head.activation](functional.linear(x, layer.weight, layer.bias))
    return functional.linear(x, head.output.weight, head.output.bias)
