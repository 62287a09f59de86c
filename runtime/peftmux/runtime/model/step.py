"""What the layers of a model read of the step that is running."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from peftmux.kernels.attention import AttentionRows
from peftmux.kernels.lowrank import Segments
from peftmux.kernels.routed import Shares


@dataclass(frozen=True, slots=True, eq=False)
class SlotRows:
    """The rows of one adapter in a step, as a flat batch of their own."""

    tokens: Tensor
    """[N] int64: which of the step's T tokens."""
    positions: Tensor
    """[N] int64, position ids."""
    slots: Tensor
    """[N] int64, in the flattened cache."""
    rows: AttentionRows


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step, on the device. T is the number of tokens, S of the positions whose logits are needed."""

    ids: Tensor
    """[1, T] int64."""
    positions: Tensor
    """[1, T] int64, position ids."""
    slots: Tensor
    """[T] int64: where each token's key and value go in the flattened cache."""
    rows: AttentionRows
    segments: Segments
    """Adapters of the T tokens."""
    keep: Tensor
    """[S] int64: tokens whose logits are needed."""
    kept: Segments
    """Adapters of the S tokens, for the output projection."""
    states: Tensor | None = None
    """[N] int64: tokens whose final hidden states are read; None where nobody reads any."""
    shares: Shares = field(default_factory=dict)
    """Of the slots whose experts are weighed by what a first pass has seen."""
    vectors: tuple[Tensor, Tensor] | None = None
    """Tokens that are vectors: ([n] int64, which of the T; [n, D], what stands for their embeddings)."""
    ladders: Mapping[int, SlotRows] = field(default_factory=dict)
    """By slot, of adapters with a side network."""


class StepState:
    """Holds the running step for every layer of one model. Set by the runner before the forward; one thread only."""

    __slots__ = ("_inputs",)

    def __init__(self) -> None:
        self._inputs: StepInputs | None = None

    def set(self, inputs: StepInputs) -> None:
        self._inputs = inputs

    @property
    def inputs(self) -> StepInputs:
        assert self._inputs is not None, "a layer ran outside a step"
        return self._inputs
