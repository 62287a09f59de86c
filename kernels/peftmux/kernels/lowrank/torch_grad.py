"""The low-rank term of many adapters over one batch, with gradients, in torch: for training on a CPU.

    y'[i] = y[i] + s B A x[i],   s, A, B of the adapter of token i

One node of the graph for all adapters: their rows are neither cut out of the batch nor put together again, in neither
direction. As in the reference everything is computed in the factors' dtype and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftmux.kernels.lowrank.reference import LinearPart
from peftmux.kernels.lowrank.segments import Segments


def add_lowrank(y: Tensor, x: Tensor, parts: Mapping[int, LinearPart], segments: Segments) -> Tensor:
    """y: [T, N], x: [T, K], parts: a, b and scale by slot -> [T, N] in y's dtype; differentiable in y, x, a and b.

    Tokens whose slot has no part keep their y. ValueError for parts with other pieces than these.
    """
    runs, scales, factors = [], [], []
    for slot, start, end in segments.runs:
        if slot in parts and parts[slot].rank:
            a, b = _factors(parts[slot])
            runs.append((start, end))
            scales.append(parts[slot].scale)
            factors += [a, b]
    if not runs:
        return y
    out: Tensor = _AddLowRank.apply(y, x, _Runs(tuple(runs), tuple(scales)), *factors)  # type: ignore[no-untyped-call]
    return out


def _factors(part: LinearPart) -> tuple[Tensor, Tensor]:
    if part.out_scale is not None or part.bias is not None or part.gate is not None or part.a is None or part.b is None:
        raise ValueError("expected a part of a, b and scale alone")
    return part.a, part.b


@dataclass(frozen=True, slots=True)
class _Runs:
    """Tokens (start, end) that are an adapter's, ascending, and the scale of each run's."""

    runs: tuple[tuple[int, int], ...]
    scales: tuple[float, ...]

    def others(self, tokens: int) -> list[slice]:
        """The tokens that are nobody's."""
        starts = [0, *(end for _, end in self.runs)]
        ends = [*(start for start, _ in self.runs), tokens]
        return [slice(start, end) for start, end in zip(starts, ends, strict=True) if start < end]


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, batch: _Runs, *factors: Tensor) -> Tensor:
        out = torch.empty_like(y)
        hidden = []
        for (start, end), scale, a, b in zip(batch.runs, batch.scales, factors[::2], factors[1::2], strict=True):
            h = x[start:end].to(a.dtype) @ a.t()
            _put(out[start:end], y[start:end], h, b.t(), scale)
            hidden.append(h)
        for rest in batch.others(len(y)):
            out[rest] = y[rest]
        ctx.save_for_backward(x, *hidden, *factors)
        ctx.batch = batch
        return out

    @staticmethod
    @once_differentiable  # type: ignore[no-untyped-call, untyped-decorator, unused-ignore]
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, *saved = ctx.saved_tensors
        batch: _Runs = ctx.batch
        count = len(batch.runs)
        hidden, factors = saved[:count], saved[count:]
        dx = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        grads: list[Tensor] = []
        for (start, end), scale, h, a, b in zip(
            batch.runs, batch.scales, hidden, factors[::2], factors[1::2], strict=True
        ):
            own = dy[start:end].to(b.dtype)
            dh = (own @ b).mul_(scale)
            grads += [dh.t() @ x[start:end].to(a.dtype), (own.t() @ h).mul_(scale)]
            if dx is not None:
                _multiply(dx[start:end], dh, a)
        if dx is not None:
            for rest in batch.others(len(x)):
                dx[rest] = 0
        return dy, dx, None, *grads


def _put(out: Tensor, y: Tensor, h: Tensor, b: Tensor, scale: float) -> None:
    """out = y + scale h b, without a copy where all have one dtype."""
    if out.dtype == h.dtype:
        torch.addmm(y, h, b, alpha=scale, out=out)
    else:
        out.copy_(torch.addmm(y.to(h.dtype), h, b, alpha=scale))


def _multiply(out: Tensor, left: Tensor, right: Tensor) -> None:
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)
