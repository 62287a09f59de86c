"""What is looked up for each token by its adapter's slot: scaled inputs, norms, embeddings. In the interpreter."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from peftmux.kernels.embedding import EmbeddingPart, apply_embedding_part
from peftmux.kernels.embedding import triton_path as embedding
from peftmux.kernels.inputs import InputScale
from peftmux.kernels.inputs import triton_path as inputs
from peftmux.kernels.lowrank.workspace import workspace
from peftmux.kernels.norms import NormPart, NormSite
from peftmux.kernels.norms import triton_path as norms
from peftmux.kernels.norms.formula import formula_of
from peftmux.kernels.slots import CAPACITY, SlotTable
from tests.triton.mixes import HELD, MIXES, close, owners, poisoned, segments
from tests.triton.operators import written

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PADDING = 2
"""Rows after the last token."""


def batch(mix: str, width: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(len(owners(mix)) + PADDING, width).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_scaled_inputs(mix: str, dtype: torch.dtype) -> None:
    width = 60
    site = inputs.TritonInputScaleSite(CPU)
    scales = {slot: poisoned(torch.randn(width)) for slot in HELD}
    for slot, scale in scales.items():
        site.put(slot, site.prepare(InputScale(scale)))
    x = batch(mix, width, dtype)
    before = x.clone()
    got = site.scaled(x, segments(mix))
    assert torch.equal(x, before)
    for row, slot in enumerate([*owners(mix), *[0] * PADDING]):
        if slot in scales:
            close(got[row], x[row].double() * scales[slot].double())
        else:
            assert torch.equal(got[row], x[row])
    if not set(owners(mix)) & set(HELD):
        assert got is x, "no launch"
    assert torch.equal(got, site.scaled(x, segments(mix)))


def norm_of(kind: str, width: int, dtype: torch.dtype) -> nn.Module:
    made: nn.Module = {
        "llama": lambda: LlamaRMSNorm(width, 1e-6),
        "gemma": lambda: GemmaRMSNorm(width, 1e-6),
        "layer": lambda: nn.LayerNorm(width, 1e-5),
        "plain": lambda: nn.LayerNorm(width, 1e-5, bias=False),
    }[kind]()
    torch.manual_seed(1)
    for parameter in made.parameters():
        parameter.data.normal_()
    return made.to(dtype).requires_grad_(False)


def norm64(norm: nn.Module, x: Tensor, part: NormPart | None) -> Tensor:
    """Of the parts' rounded values, by torch and transformers themselves, all in float64."""
    wide = copy.deepcopy(norm).double()
    for name in ("weight", "bias"):
        value = getattr(part, name, None)
        if value is not None:
            getattr(wide, name).data.copy_(value.to(norm.weight.dtype))
    if isinstance(norm, (LlamaRMSNorm, GemmaRMSNorm)):  # theirs compute in float32
        v, weight = x.double(), wide.get_parameter("weight") + float(isinstance(norm, GemmaRMSNorm))
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    out: Tensor = wide(x.double())
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "width"), [("llama", 60), ("gemma", 64), ("layer", 61), ("plain", 1100)])
def test_norms(kind: str, width: int, dtype: torch.dtype) -> None:
    """Slot 1 has all parameters, 2 the weight, 3 the bias if there is one."""
    norm = norm_of(kind, width, dtype)
    formula = formula_of(norm)
    assert formula is not None
    site = norms.TritonNormSite(norm, 1, formula)
    has_bias = getattr(norm, "bias", None) is not None
    bias = poisoned(torch.randn(width)) if has_bias else None
    parts = {1: NormPart(torch.randn(width), bias), 2: NormPart(torch.randn(width), None), 3: NormPart(None, bias)}
    for slot, part in parts.items():
        site.put(slot, site.prepare(part))
    for mix in MIXES if dtype is torch.float32 else ["zipf"]:
        x = batch(mix, width, dtype).unsqueeze(0) * 3
        y = torch.full_like(x, float("nan"))
        site.apply(y, x, segments(mix))
        for row, slot in enumerate([*owners(mix), *[0] * PADDING]):
            if slot in parts:
                close(y[0, row], norm64(norm, x[0, row], parts[slot]), slack=4)
            else:
                assert y[0, row].isnan().all(), "not written"


@pytest.mark.parametrize("token_dim", [1, 2])
def test_norms_of_heads(token_dim: int) -> None:
    """Queries before and after heads and tokens change places, as a slice of a fused projection."""
    norm = norm_of("llama", 16, torch.float32)
    formula = formula_of(norm)
    assert formula is not None
    site = norms.TritonNormSite(norm, token_dim, formula)
    part = NormPart(torch.randn(16))
    site.put(2, site.prepare(part))
    tokens = len(owners("zipf"))
    x = torch.randn(1, tokens, 5 * 16)[..., 16:64].view(1, tokens, 3, 16)
    x = x.transpose(1, 2) if token_dim == 2 else x
    y = torch.zeros(x.shape)
    site.apply(y, x, segments("zipf"))
    expected = torch.zeros(x.shape)
    NormSite.apply(_reference_site(norm, token_dim, part), expected, x, segments("zipf"))
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    assert y.any()


def _reference_site(norm: nn.Module, token_dim: int, part: NormPart) -> NormSite:
    site = NormSite(norm, token_dim)
    site.put(2, site.prepare(part))
    return site


def test_a_norm_of_another_formula_keeps_the_reference() -> None:
    class Cubed(LlamaRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) ** 3

    assert formula_of(Cubed(32)) is None
    assert formula_of(nn.GroupNorm(4, 32)) is None
    assert formula_of(LlamaRMSNorm(32)) is not None


V, D = 40, 70


def embedding_parts() -> dict[int, EmbeddingPart]:
    """LoRA of rank 5; DoRA of rank 19 with three tokens retrained; a table of its own."""
    torch.manual_seed(2)
    ids = torch.tensor([7, 0, 39])
    return {
        1: EmbeddingPart(torch.randn(5, V), torch.randn(D, 5), 0.5),
        2: EmbeddingPart(torch.randn(19, V) / 4, torch.randn(D, 19), 2.0, torch.rand(D) + 0.5, ids, torch.randn(3, D)),
        3: EmbeddingPart(rows=torch.randn(V, D)),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_embeddings(mix: str, dtype: torch.dtype) -> None:
    parts = embedding_parts()
    site = embedding.TritonEmbeddingSite(CPU)
    for slot, part in parts.items():
        site.put(slot, site.prepare(part))
    y = batch(mix, D, dtype)
    ids = torch.tensor([7, 39, 1, 5, 0, 7, 7, 38, 2, 3, 4])[: len(y)]
    got, again = y.clone(), y.clone()
    site.apply(got, ids, segments(mix))
    site.apply(again, ids, segments(mix))
    assert torch.equal(got, again)
    for row, slot in enumerate([*owners(mix), *[0] * PADDING]):
        if slot in parts:
            close(got[row], _embedding64(y[row : row + 1], ids[row : row + 1], parts[slot])[0], slack=16)
        else:
            assert torch.equal(got[row], y[row])


def _embedding64(y: Tensor, ids: Tensor, part: EmbeddingPart) -> Tensor:
    a, b, g, rows = (None if t is None else t.double() for t in (part.a, part.b, part.out_scale, part.rows))
    return apply_embedding_part(y.double(), ids, EmbeddingPart(a, b, part.scale, g, part.ids, rows))


def test_more_changed_ids_than_are_read_at_once() -> None:
    ids = torch.randperm(1000)[:600]
    site = embedding.TritonEmbeddingSite(CPU)
    rows = torch.randn(600, 8)
    site.put(4, site.prepare(EmbeddingPart(ids=ids, rows=rows)))
    y = torch.zeros(3, 8)
    asked = torch.tensor([int(ids[599]), int(ids[300]), next(i for i in range(1000) if i not in set(ids.tolist()))])
    embedding.adapt_embedding_(y, asked, torch.full((3,), 4, dtype=torch.int32), site._table.tensor)
    assert torch.equal(y, torch.stack([rows[599], rows[300], torch.zeros(8)]))


def test_a_dropped_adapter_is_gone_and_a_table_keeps_its_place() -> None:
    table = SlotTable(2, CPU)
    version = workspace(CPU).generation
    vector = torch.ones(3)
    table.put(1, vector, 7)
    assert workspace(CPU).generation > version, "made"
    version, place = workspace(CPU).generation, table.tensor.data_ptr()
    assert table.tensor[1].tolist() == [vector.data_ptr(), 7]
    table.put(CAPACITY - 1, 0, 3)
    table.drop(1)
    table.drop(5)
    assert (workspace(CPU).generation, table.tensor.data_ptr(), len(table)) == (version, place, 1)
    assert not table.tensor[1].any()
    table.put(CAPACITY, 1, 2)
    assert workspace(CPU).generation > version, "moved"
    assert table.tensor[[CAPACITY - 1, CAPACITY]].tolist() == [[0, 3], [1, 2]]


def test_operators_can_be_traced_without_running() -> None:
    slots, x = torch.ones(2, dtype=torch.int32), torch.randn(2, 1, D)
    scale, norm = torch.randn(D), (torch.randn(D), torch.randn(D))
    scales = torch.tensor([[0], [scale.data_ptr()]])
    norm_table = torch.tensor([[0, 0], [one.data_ptr() for one in norm]])
    site = embedding.TritonEmbeddingSite(CPU)
    site.put(1, site.prepare(embedding_parts()[1]))
    ids, table = torch.tensor([7, 39]), site._table.tensor
    assert written(inputs.scale_rows, (x[:, 0], slots, scales)) == set()
    changed = written(norms.slot_norm_, (x, x.clone(), norm[0], slots, norm_table, 1e-6, True, 0.0))
    assert changed == {"y"}
    assert written(embedding.adapt_embedding_, (x[:, 0], ids, slots, table)) == {"y"}
