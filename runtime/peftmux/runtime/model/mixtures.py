"""Feed-forward blocks of the base in which some tokens have mixtures of low-rank variants in the block's place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftmux.adapters.feed_forward import FeedForward
from peftmux.kernels.mixture import BlockShape, MixtureSite
from peftmux.runtime.model.step import StepState


class Mixtures:
    """One block's adapters of this kind. The base's inner and outer products stay one each for all tokens."""

    def __init__(self, module: nn.Module, block: FeedForward, step: StepState) -> None:
        self.block = block
        self._module: Any = module  # its projections are read late: they are swapped after this is made
        self._step = step
        weight = getattr(module, block.outer).weight
        inner = {name: _shape(getattr(module, name)) for name in block.inner}
        shape = BlockShape(inner, block.outer, _shape(getattr(module, block.outer)))
        self.site = MixtureSite(shape, block.activate, weight.dtype, weight.device)

    def finish(self, x: Tensor, inner: Sequence[Tensor], hidden: Tensor) -> Tensor:
        """The block's output from x: [..., D], the inner projections [..., n] and the base's own hidden [..., I]."""
        flat = [t.reshape(-1, t.shape[-1]) for t in (x, *inner)]
        mixed = hidden.reshape(-1, hidden.shape[-1])
        added = self.site.mix(flat[0], flat[1:], mixed, self._step.inputs.segments)
        out: Tensor = getattr(self._module, self.block.outer)(mixed.view(hidden.shape))
        rows = out.view(-1, out.shape[-1])
        for start, end, terms in added:
            rows[start:end] += terms
        return out


class MixedForward:
    """Stands for the `forward` of a block that has no faster form; the block's own wherever it has no such adapter."""

    def __init__(self, module: nn.Module, mixtures: Mixtures) -> None:
        self._base: Callable[[Tensor], Tensor] = module.forward
        self._module = module
        self._mixtures = mixtures

    def __call__(self, x: Tensor) -> Tensor:
        if self._mixtures.site.empty:
            return self._base(x)
        block = self._mixtures.block
        inner = [getattr(self._module, name)(x) for name in block.inner]
        return self._mixtures.finish(x, inner, block.activate(inner))


def _shape(layer: Any) -> tuple[int, int]:
    """(in, out)."""
    rows, columns = layer.weight.shape
    return (rows, columns) if isinstance(layer, Conv1D) else (columns, rows)
