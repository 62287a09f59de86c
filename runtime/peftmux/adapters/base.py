"""What lowering must know of the base model. Implemented by the runtime's loaded model and by a plain torch module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LinearSite:
    """A linear layer of the base that parts can attach to, under the module path the base model gives it."""

    name: str
    in_features: int
    out_features: int
    has_bias: bool
    conv1d: bool
    """The weight is stored [in, out] (transformers' Conv1D); `weight()` below always returns [out, in]."""


@dataclass(frozen=True, slots=True)
class NormLayer:
    """A normalisation layer over `features` values, with a weight and perhaps a bias."""

    name: str
    features: int
    has_bias: bool


@dataclass(frozen=True, slots=True)
class ParameterSite:
    """A weight that is no linear layer's: all experts of a mixture stacked, or the router that chooses among them."""

    name: str
    """Path of the parameter."""
    experts: int
    """0: one matrix, the router's."""
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class FeedForwardSite:
    """A feed-forward block: `outer` reads what the activation makes of the `inner` projections (names of children)."""

    name: str
    inner: tuple[str, ...]
    outer: str


@dataclass(frozen=True, slots=True)
class ResidualBranch:
    """An attention or feed-forward module whose output is added, as it is, to the residual stream that `norm` reads."""

    name: str
    layer: int
    role: str
    """ "attention" or "feed_forward"."""
    norm: str


@dataclass(frozen=True, slots=True)
class KVShape:
    """One attention layer's cache: keys [kv_heads, key_dim] and values [kv_heads, value_dim] per token."""

    kv_heads: int
    key_dim: int
    value_dim: int


class BaseModel(Protocol):
    """The base model as lowering sees it."""

    @property
    def architecture(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def state_width(self) -> int:
        """Width of the final hidden states, after the last norm; 0 where they cannot be read apart from the logits."""
        ...

    @property
    def linear_sites(self) -> Mapping[str, LinearSite]: ...
    @property
    def branches(self) -> Mapping[str, ResidualBranch]:
        """By module path; none where the base's blocks have another form."""
        ...

    @property
    def stream_layers(self) -> Sequence[str]:
        """Paths of the decoder's layers in order, each reading what the one before it gives, [T, hidden size]; none
        where the base is built otherwise, or its final hidden states cannot be read apart from the logits."""
        ...

    @property
    def norm_sites(self) -> Mapping[str, NormLayer]: ...
    @property
    def parameter_sites(self) -> Mapping[str, ParameterSite]: ...
    @property
    def feed_forwards(self) -> Mapping[str, FeedForwardSite]: ...
    @property
    def parameter_names(self) -> Sequence[str]:
        """Every parameter's path, module by module."""
        ...

    @property
    def module_names(self) -> frozenset[str]:
        """Every module path of the base, to tell "not in this base" from "not a site we serve"."""
        ...

    @property
    def embedding(self) -> str:
        """Module path of the input embedding; "" where it is more than a table of rows, scaled or not."""
        ...

    @property
    def embedding_width(self) -> int:
        """What the input embedding makes of a token; the hidden size, unless a projection follows."""
        ...

    @property
    def takes_virtual_tokens(self) -> bool:
        """What the input embedding gives for single tokens can be replaced."""
        ...

    @property
    def head(self) -> str | None:
        """The linear site that turns hidden states into logits; None where it is not a plain linear layer."""
        ...

    @property
    def tied(self) -> bool:
        """The head's weight is the input embedding's, and that is a plain table."""
        ...

    @property
    def shows_hidden_state(self) -> bool:
        """Whether the decoder's output is the last hidden state that transformers reports."""
        ...

    @property
    def windowed(self) -> bool:
        """Some attention layer sees only the tokens of a sliding window."""
        ...

    @property
    def kv_shapes(self) -> Sequence[KVShape]: ...
    def weight(self, site: str) -> Tensor:
        """The base weight of a linear site, [out, in], in the base's dtype."""
        ...

    def bias(self, site: str) -> Tensor | None:
        """The base bias of a linear site, [out], or None."""
        ...

    def embedding_weight(self) -> Tensor:
        """The input embedding, [V, D], in the base's dtype."""
        ...
