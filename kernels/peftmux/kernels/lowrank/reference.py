"""The linear-site operator: what every adapter method that touches a linear layer lowers to.

    y'[t] = out_scale * ( y[t] + scale * B (g(x[t]) * A x[t]) ) + bias,      y = W x + b  (the base layer's own output)

    g(x) = 1, or with a gate G of E experts: softmax(G x), the e-th value for the e-th r/E of the ranks

Source: LoRA (Hu et al., 2021, arXiv 2106.09685) for the low-rank term; DoRA (Liu et al., 2024, arXiv 2402.09353) for
the output scale; LoRAMoE (Dou et al., 2023, arXiv 2312.09979) for the gate. This file is the one definition; every
other form of the operator is tested against it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True, slots=True)
class LinearPart:
    """What one adapter does at one linear site. Absent pieces are None; `a` and `b` come together, `gate` with them.

    a: [r, in], b: [out, r], out_scale: [out], bias: [out], gate: [E, in] where E divides r.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    out_scale: Tensor | None = None
    bias: Tensor | None = None
    gate: Tensor | None = None

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]

    @property
    def experts(self) -> int:
        """How many its gate weighs; 0 without one."""
        return 0 if self.gate is None else self.gate.shape[0]


def apply_linear_part(y: Tensor, x: Tensor, part: LinearPart) -> Tensor:
    """The definition above, differentiable. y: [T, out], x: [T, in] -> [T, out], in y's dtype.

    Everything is computed in the parts' dtype (float32 for training and for the oracle), rounded once at the end.
    """
    out = y
    if part.a is not None and part.b is not None:
        t = linear(x.to(part.a.dtype), part.a)
        if part.gate is not None:
            t = gated(t, linear(x.to(part.gate.dtype), part.gate))
        out = out + part.scale * linear(t, part.b)
    if part.out_scale is not None:
        out = out * part.out_scale
    if part.bias is not None:
        out = out + part.bias
    return out.to(y.dtype)


def gated(t: Tensor, logits: Tensor) -> Tensor:
    """t: [T, r] times the softmax of logits [T, E], each expert's share for its own r/E neighbouring ranks."""
    return t * logits.softmax(-1).repeat_interleave(t.shape[-1] // logits.shape[-1], -1)
