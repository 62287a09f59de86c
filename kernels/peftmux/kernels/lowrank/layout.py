"""One adapter's parts at one (possibly fused) linear site, as the operators read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftmux.kernels.lowrank.reference import LinearPart
from peftmux.kernels.placed import checked


@dataclass(frozen=True, eq=False, slots=True)
class Prepared:
    """Parts of all slices together; N is the sum of the slices, R of their ranks. Owned by the site once put.

    y'[:, slice] = out_scale * (y[:, slice] + (rank_scale * (x A^T))[:, ranks of slice] B) + bias, where a slice with
    experts has its ranks weighed by the softmax of x times its gate, whose rows follow the ranks of all slices in A.
    """

    ranks: tuple[int, ...]
    """Of each slice, 0 where it has no low-rank term."""
    a: Tensor
    """[R + sum of experts, K] in the site's dtype: the slices' A below each other, then their gates."""
    b: Tensor
    """[sum of r * N_slice] in the site's dtype: slice by slice, panel by panel, rank rows [r, columns of the panel]."""
    rank_scale: Tensor
    """As many as rows of A, float32: each slice's scale, once a rank; 1 for the gates."""
    out_scale: Tensor | None
    """[N] float32, ones where a slice has none; None together with bias."""
    bias: Tensor | None
    """[N] float32, zeros where a slice has none."""
    experts: tuple[int, ...]
    """Of each slice, 0 where it has no gate."""
    scales: tuple[float, ...]
    """Of each slice."""

    @property
    def gated(self) -> bool:
        return any(self.experts)

    @property
    def nbytes(self) -> int:
        held = (self.a, self.b, self.rank_scale, self.out_scale, self.bias)
        return sum(t.nbytes for t in held if t is not None)


def prepare(
    parts: Sequence[LinearPart | None],
    in_features: int,
    slices: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    panel: int | None = None,
    most_experts: int | None = None,
) -> Prepared:
    """Cast and lay out one part per slice (None: this adapter leaves the slice alone).

    B is cut into panels of so many columns, the last of a slice narrower; None makes a slice one panel. One gate weighs
    at most `most_experts`, None for any number.

    Pure, so a loader thread may run it. Raises ValueError for wrong shapes and for values that are not finite in the
    site's dtype: rows of other adapters may share a product with them.
    """
    if len(parts) != len(slices):
        raise ValueError(f"expected {len(slices)} parts, one per slice, got {len(parts)}")
    present = [p or LinearPart() for p in parts]
    for i, (part, out) in enumerate(zip(present, slices, strict=True)):
        _check(part, i, in_features, out)
    ranks = tuple(p.rank for p in present)
    experts = tuple(p.experts for p in present)
    if most_experts is not None and max(experts) > most_experts:
        raise ValueError(f"expected at most {most_experts} experts on this device, got {max(experts)}")
    a = torch.empty(sum(ranks) + sum(experts), in_features, dtype=dtype, device=device)
    b = torch.empty(sum(r * n for r, n in zip(ranks, slices, strict=True)), dtype=dtype, device=device)
    areas = torch.split(b, [r * n for r, n in zip(ranks, slices, strict=True)])
    for part, a_rows, area in zip(present, torch.split(a[: sum(ranks)], list(ranks)), areas, strict=True):
        if part.a is not None and part.b is not None:
            a_rows.copy_(part.a.detach())
            _fill_panels(area, part.b.detach(), panel or part.b.shape[0])
    for part, gate_rows in zip(present, torch.split(a[sum(ranks) :], list(experts)), strict=True):
        if part.gate is not None:
            gate_rows.copy_(part.gate.detach())
    scales = [part.scale for part in present for _ in range(part.rank)] + [1.0] * sum(experts)
    changed = any(p.out_scale is not None or p.bias is not None for p in present)
    prepared = Prepared(
        ranks=ranks,
        a=a,
        b=b,
        rank_scale=torch.tensor(scales, dtype=torch.float32, device=device),
        out_scale=_per_output([p.out_scale for p in present], slices, 1.0, device) if changed else None,
        bias=_per_output([p.bias for p in present], slices, 0.0, device) if changed else None,
        experts=experts,
        scales=tuple(p.scale for p in present),
    )
    for name in ("a", "b", "rank_scale", "out_scale", "bias"):
        value = getattr(prepared, name)
        if value is not None:
            checked(value, name)
    return prepared


def _fill_panels(area: Tensor, b: Tensor, panel: int) -> None:
    """area: [out * r] -> the rank rows of b [out, r], panel by panel."""
    at = 0
    for columns in torch.split(b, panel):
        area[at : at + columns.numel()].view(columns.shape[1], -1).copy_(columns.t())
        at += columns.numel()


def _check(part: LinearPart, index: int, in_features: int, out: int) -> None:
    if (part.a is None) != (part.b is None):
        raise ValueError(f"slice {index}: expected a and b together, got only one")
    if part.experts and (part.a is None or part.rank % part.experts):
        raise ValueError(f"slice {index}: expected a rank that {part.experts} experts share, got {part.rank}")
    expected = {
        "a": (part.rank, in_features),
        "b": (out, part.rank),
        "out_scale": (out,),
        "bias": (out,),
        "gate": (part.experts, in_features),
    }
    for name, shape in expected.items():
        tensor = getattr(part, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"slice {index}: expected {name} of shape {shape}, got {tuple(tensor.shape)}")


def _per_output(given: Sequence[Tensor | None], slices: tuple[int, ...], fill: float, device: torch.device) -> Tensor:
    whole = torch.full((sum(slices),), fill, dtype=torch.float32, device=device)
    for target, tensor in zip(torch.split(whole, list(slices)), given, strict=True):
        if tensor is not None:
            target.copy_(tensor.detach())
    return whole
