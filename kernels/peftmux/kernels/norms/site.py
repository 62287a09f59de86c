"""The adapters with parameters of their own for one normalisation layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftmux.kernels.lowrank import Segments
from peftmux.kernels.norms.reference import NormPart, apply_norm_part
from peftmux.kernels.placed import placed


@dataclass(frozen=True, slots=True, eq=False)
class PreparedNorm:
    """A part on its device, in the norm's dtype: owned by the site once put."""

    part: NormPart
    nbytes: int


class NormSite:
    """`prepare` may run in any thread; everything else belongs to the thread that runs the model."""

    graphed = False
    """Whether a captured CUDA graph serves whatever adapters come here later."""

    def __init__(self, norm: nn.Module, token_dim: int) -> None:
        """token_dim: of the norm's input, along which the tokens lie."""
        weight = norm.weight
        assert isinstance(weight, Tensor)
        self._norm = norm
        self._token_dim = token_dim
        self._dtype, self._device = weight.dtype, weight.device
        self._held: dict[int, NormPart] = {}

    @property
    def empty(self) -> bool:
        return not self._held

    def prepare(self, part: NormPart) -> PreparedNorm:
        """ValueError for values that are not finite in the norm's dtype."""
        weight, bias = (
            None if t is None else placed(t, self._device, self._dtype, "a norm's parameters")
            for t in (part.weight, part.bias)
        )
        return PreparedNorm(NormPart(weight, bias), sum(t.nbytes for t in (weight, bias) if t is not None))

    def put(self, slot: int, prepared: PreparedNorm) -> None:
        self._held[slot] = prepared.part

    def drop(self, slot: int) -> None:
        self._held.pop(slot, None)

    @torch.inference_mode()
    def apply(self, y: Tensor, x: Tensor, segments: Segments) -> None:
        """Write, in place, the outputs of tokens whose adapter has a part here. x, y: [..., D]."""
        for slot, start, end in segments.runs:
            part = self._held.get(slot)
            if part is not None:
                given = x.narrow(self._token_dim, start, end - start)
                y.narrow(self._token_dim, start, end - start).copy_(apply_norm_part(self._norm, given, part))
