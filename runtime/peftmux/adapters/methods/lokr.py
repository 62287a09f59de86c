"""LoKr: the Kronecker product of two matrices, either of which may be a product of low rank itself.

    W1 (x) W2 = (U1 V1) (x) (U2 V2) = (U1 (x) U2) (V1 (x) V2):    a low-rank update of rank rank(W1) * rank(W2)

Source: Yeh et al., 2023 (LyCORIS), arXiv 2309.14859. PEFT saves `<layer>.lokr_w1` or `.lokr_w1_a`, `.lokr_w1_b`, and
likewise w2; the scale is alpha / r. How out and in are factored follows from `decompose_factor`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftmux.adapters.base import BaseModel, LinearSite
from peftmux.adapters.config import FieldTable, Honoured
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.methods import targeted
from peftmux.adapters.methods.loha import LYCORIS, lycoris_rank, shortened
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes
from peftmux.adapters.methods.targeted import Targeted
from peftmux.adapters.parts import LinearPart

FIELDS: FieldTable = {
    **LYCORIS,
    "decompose_both": Honoured(False, lambda v: v is True, "true or false"),
    "decompose_factor": Honoured(-1, lambda v: type(v) is int, "an integer"),
}
_TENSORS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and every tensor's name and shape against the base."""
    found = targeted.read_targeted(config, FIELDS, shapes, base, _TENSORS)
    targeted.refuse_conv1d(found, "LoKr")
    factors, scales = {}, {}
    for site in found.sites:
        rank, alpha = lycoris_rank(found, site.name)
        factors[site.name] = _claim(found, site, rank)
        scales[site.name] = alpha / rank

    def build(tensors: Mapping[str, Tensor]) -> Parts:
        linear = {}
        for site in found.sites:
            (u1, v1), (u2, v2) = (_split([tensors[n] for n in names]) for names in factors[site.name])
            part = LinearPart(torch.kron(v1, v2), torch.kron(u1, u2), scales[site.name])
            linear[site.name] = shortened(part)
        return Parts(linear)

    return found.finish("lokr", build)


def _claim(found: Targeted, site: LinearSite, rank: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tensors of both factors: one where it is stored whole, two where it is a product."""
    factor = found.fields["decompose_factor"]
    (in1, in2), (out1, out2) = factorization(site.in_features, factor), factorization(site.out_features, factor)
    split1 = found.fields["decompose_both"] and rank < max(out1, in1) / 2
    split2 = rank < max(out2, in2) / 2
    names: list[tuple[str, ...]] = []
    for index, split, out, width in ((1, split1, out1, in1), (2, split2, out2, in2)):
        whole, left, right = found.stem(site, *(f"lokr_w{index}{s}" for s in ("", "_a", "_b")))
        if split:
            found.ledger.claim(left, (out, rank))
            found.ledger.claim(right, (rank, width))
            names.append((left, right))
        else:
            found.ledger.claim(whole, (out, width))
            names.append((whole,))
    return names[0], names[1]


def factorization(size: int, factor: int) -> tuple[int, int]:
    """Two factors of a size: `factor` and its partner where it divides, else the closest pair, the smaller first and
    at most `factor` (-1: any), as LyCORIS and PEFT choose them.
    """
    if factor == 0 or factor < -1:
        raise AdapterInvalid(Reason.INVALID_FIELD, f"field decompose_factor: expected -1 or 1 and more, got {factor}")
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    small = max(d for d in range(1, int(size**0.5) + 1) if size % d == 0 and d <= limit)
    return small, size // small


def _split(stored: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A factor [m, n] as a product; a whole one times the identity of its smaller side."""
    if len(stored) == 2:
        return stored[0], stored[1]
    (whole,) = stored
    m, n = whole.shape
    return (torch.eye(m), whole) if m <= n else (whole, torch.eye(n))


METHOD = Method("LOKR", plan, lambda base: ("lokr",) if base.linear_sites else ())
