"""The input embedding's operator against the table that it stands for, alone and in a batch of several adapters."""

from __future__ import annotations

import pytest
import torch

from peftmux.kernels.embedding import EmbeddingPart, EmbeddingSite, apply_embedding_part
from peftmux.kernels.lowrank import Segments

V, D, R = 23, 6, 3
CPU = torch.device("cpu")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


TABLE = random(V, D)
IDS = torch.tensor([4, 22, 0])
PARTS = {
    "low rank": EmbeddingPart(random(R, V), random(D, R), 0.7),
    "scaled": EmbeddingPart(random(R, V), random(D, R), 0.7, out_scale=random(D)),
    "rows": EmbeddingPart(ids=IDS, rows=random(3, D)),
    "low rank, then rows": EmbeddingPart(random(R, V), random(D, R), -2.0, random(D), IDS, random(3, D)),
    "all rows": EmbeddingPart(rows=random(V, D)),
    "nothing": EmbeddingPart(),
}


def table(part: EmbeddingPart) -> torch.Tensor:
    """The equation, for the whole table."""
    new = TABLE.clone()
    if part.a is not None and part.b is not None:
        new += part.scale * (part.b @ part.a).t()
    if part.out_scale is not None:
        new *= part.out_scale
    if part.rows is not None:
        new[slice(None) if part.ids is None else part.ids] = part.rows
    return new


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("count", [0, 1, 63])
def test_each_token_gets_its_row_of_the_new_table(name, count):
    ids = torch.randint(0, V, (count,), generator=torch.Generator().manual_seed(2))
    out = apply_embedding_part(TABLE[ids], ids, PARTS[name])
    torch.testing.assert_close(out, table(PARTS[name])[ids], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PARTS)
def test_half_precision_is_rounded_once(name):
    ids = torch.arange(V)
    half = TABLE.bfloat16()
    out = apply_embedding_part(half, ids, PARTS[name])
    assert out.dtype == torch.bfloat16
    exact = apply_embedding_part(half.float(), ids, PARTS[name])
    torch.testing.assert_close(out, exact.bfloat16(), atol=0, rtol=0)


def test_gradients():
    pieces = [random(*s).double().requires_grad_() for s in ((R, V), (D, R), (D,), (3, D))]
    ids = torch.tensor([1, 4, 4, 9])
    y = TABLE[ids].double()
    assert torch.autograd.gradcheck(
        lambda a, b, s, rows: apply_embedding_part(y, ids, EmbeddingPart(a, b, 0.5, s, IDS, rows)), pieces
    )


def test_only_a_slots_own_tokens_change():
    site = EmbeddingSite(CPU)
    assert site.empty
    for slot, part in enumerate(PARTS.values(), start=1):
        site.put(slot, site.prepare(part))
    slots, lens = [0, 3, 1, 0, 5, 4, 2, 9], [2, 3, 1, 4, 5, 2, 1, 3]
    ids = torch.randint(0, V, (sum(lens),), generator=torch.Generator().manual_seed(3))
    y = TABLE[ids]
    site.apply(y, ids, Segments.build(slots, lens, CPU))
    tables = [TABLE, *(table(part) for part in PARTS.values()), *[TABLE] * 9]
    row_slots = [slot for slot, n in zip(slots, lens, strict=True) for _ in range(n)]
    expected = torch.stack([tables[slot][i] for slot, i in zip(row_slots, ids.tolist(), strict=True)])
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_a_dropped_slot_is_the_base_again():
    site = EmbeddingSite(CPU)
    prepared = site.prepare(PARTS["rows"])
    assert prepared.nbytes == 3 * D * 4 + 3 * 8
    site.put(2, prepared)
    site.drop(2)
    site.drop(2)
    assert site.empty
    ids = torch.arange(V)
    y = TABLE.clone()
    site.apply(y, ids, Segments.build([2], [V], CPU))
    assert torch.equal(y, TABLE)
