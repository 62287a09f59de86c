"""Residual branches of the base in which some tokens have bottlenecks beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftmux.kernels.bottleneck import branch_site
from peftmux.runtime.model.step import StepState


class BranchForward:
    """Stands, while an adapter is here, for the `forward` of a module that adds to the residual stream.

    The stream is what the block's norm reads: its forward is watched as long.
    """

    def __init__(
        self, module: nn.Module, norm: nn.Module, step: StepState, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._module = module
        self._base: Callable[..., Any] = module.forward
        self._norm_forward: Callable[..., Any] = norm.forward
        self._norm = norm
        self._step = step
        self._stream: Tensor | None = None
        self.site = branch_site(dtype, device, self._watch)

    def _watch(self, occupied: bool) -> None:
        """Called between steps."""
        self._module.forward = self if occupied else self._base
        self._norm.forward = self._seen if occupied else self._norm_forward

    def _seen(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._stream = x
        return self._norm_forward(x, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._base(*args, **kwargs)
        assert self._stream is not None, "the branch ran before its norm"
        y = out[0] if isinstance(out, tuple) else out
        h, self._stream = self._stream, None
        self.site.apply(y.view(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), self._step.inputs.segments)
        return out
