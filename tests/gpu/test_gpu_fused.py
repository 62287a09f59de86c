"""The smaller operators on a CUDA device, against their definitions in float64, eagerly and in a captured graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peftmux.kernels.bottleneck import Bottleneck, apply_bottleneck, branch_site
from peftmux.kernels.elementwise import choose_elementwise
from peftmux.kernels.embedding import EmbeddingPart, embedding_site
from peftmux.kernels.inputs import InputScale, input_scale_site
from peftmux.kernels.lowrank import Segments
from peftmux.kernels.lowrank.tiles import TileBuffer
from peftmux.kernels.lowrank.workspace import workspace
from peftmux.kernels.norms import NormPart, norm_site
from peftmux.kernels.rows import ReplacedRows, apply_replaced_rows, rows_site
from peftmux.kernels.sparse import SparsePart, apply_sparse_part, sparse_site
from peftmux.kernels.tree import mapped

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def close(got: Tensor, expected: Tensor) -> None:
    """float32: a few units of rounding; the others: one rounding."""
    bound = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[got.dtype]
    torch.testing.assert_close(got.double(), expected, rtol=bound * 1.02, atol=max(bound * 2e-2, 2e-6))


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(dtype: torch.dtype) -> None:
    path = choose_elementwise("cuda", dtype)
    assert path.name == "triton"
    for shape in ((1, 63, 4096), (1, 5, 32, 128), (3, 60), (1, 2, 14336)):
        x, weight = normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype, seed=1)
        wide = x.double()
        expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        close(path.rms_norm(x, weight, 1e-5), expected)
        gate, up = wide.chunk(2, -1)
        close(path.swiglu(x), gate * torch.sigmoid(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_of_a_fused_projection(dtype: torch.dtype) -> None:
    path = choose_elementwise("cuda", dtype)
    assert path.rotate_pair_ is not None
    fused = normal(63, 48 * 128, dtype=dtype)
    angle = normal(63, 64, seed=1).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    before = fused.double().view(63, 48, 128)
    q, k, _ = fused.view(63, 48, 128).split([32, 8, 8], 1)
    path.rotate_pair_(q, k, cos, sin)
    first, second = before.chunk(2, -1)
    turned = before * cos.double()[:, None] + torch.cat([-second, first], -1) * sin.double()[:, None]
    close(fused.view(63, 48, 128), torch.cat([turned[:, :40], before[:, 40:]], 1))


def test_a_captured_graph_serves_adapters_that_come_and_go() -> None:
    """Scaled inputs, norms and embeddings: captured over one step, replayed for another with other adapters."""
    device, width = torch.device("cuda"), 256
    scales, embeddings = input_scale_site(device), embedding_site(device)
    base = torch.nn.LayerNorm(width, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    norms = norm_site(base, 0)
    sites: tuple[Any, ...] = (scales, embeddings, norms)
    assert all(site.graphed for site in sites)
    parts = [
        (InputScale(normal(width, seed=s)), EmbeddingPart(normal(8, 50, seed=s), normal(width, 8, seed=s)), norm(s))
        for s in (1, 2)
    ]

    def put(slot: int) -> None:
        for site, part in zip(sites, parts[slot - 1], strict=True):
            site.put(slot, site.prepare(part))

    buffer = TileBuffer(4, 4, device, [(1, 0, 2)])
    segments = Segments.over(buffer, device)
    x, ids = normal(4, width, dtype=torch.bfloat16), torch.tensor([3, 49, 0, 7], device=device)
    y, z = torch.empty_like(x), torch.empty_like(x)

    def run(step: Segments) -> tuple[Tensor, Tensor, Tensor]:
        y.copy_(base(x))
        norms.apply(y, x, step)
        z.copy_(x)
        embeddings.apply(z, ids, step)
        return scales.scaled(x, step), y, z

    put(1)
    run(segments)
    version = workspace(device).generation
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scaled, *_ = run(segments)
    put(2)
    for slot in (1, 2):
        if slot == 2:
            for site in sites:
                site.drop(1)
        buffer.fill([(slot, 1, 3)])
        graph.replay()
        got = [t.clone() for t in (scaled, y, z)]
        expected = run(Segments.build([0, slot, 0], [1, 2, 1], device))
        for ours, eager in zip(got, expected, strict=True):
            assert torch.equal(ours, eager)
            assert not torch.equal(ours[1:3], (base(x) if eager is y else x)[1:3])
        assert torch.equal(got[0][[0, 3]], x[[0, 3]])
    assert workspace(device).generation == version


def norm(seed: int) -> NormPart:
    return NormPart(normal(256, seed=seed), normal(256, seed=seed + 5))


def tiled_parts(seed: int) -> list[Any]:
    """A sparse change, replaced rows with a bias, and a bottleneck, of 256 inputs and outputs."""
    generator = torch.Generator().manual_seed(seed)
    indices = (torch.rand(256, 256, generator=generator) < 0.02).nonzero().t()
    rows = torch.randn(9, 256, generator=generator)
    down, up = torch.randn(24, 256, generator=generator) / 16, torch.randn(256, 24, generator=generator) / 4
    return [
        SparsePart(indices, torch.randn(indices.shape[1], generator=generator)),
        ReplacedRows(rows, torch.randperm(256, generator=generator)[:9], rows[:, 0].contiguous()),
        Bottleneck(down, torch.ones(24), up, torch.ones(256), torch.tensor([0.5]), "gelu", "sum"),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lens", [[2, 1, 2], [30, 3, 20], [300, 5, 70]])
def test_tiles(lens: list[int], dtype: torch.dtype) -> None:
    """Tiles of 1, 16 and 64 tokens, against the definitions in float64 on the CPU; the base's rows stay."""
    device = torch.device("cuda")
    sites: list[Any] = [sparse_site(256, 256, device), rows_site(dtype, device)]
    sites.append(branch_site(dtype, device, lambda held: None))
    applied: list[Any] = [apply_sparse_part, apply_replaced_rows, apply_bottleneck]
    parts = {slot: tiled_parts(slot) for slot in (1, 2)}
    x, before = normal(sum(lens), 256, dtype=dtype), normal(sum(lens), 256, dtype=dtype, seed=1)
    step = Segments.build([1, 0, 2], lens, device)
    for kind, (site, apply) in enumerate(zip(sites, applied, strict=True)):
        for slot in (1, 2):
            site.put(slot, site.prepare(parts[slot][kind]))
        y, again = before.clone(), before.clone()
        site.apply(y, x, step)
        site.apply(again, x, step)
        assert torch.equal(y, again)
        assert torch.equal(y[lens[0] : lens[0] + lens[1]], before[lens[0] : lens[0] + lens[1]])
        for slot, start, end in step.runs:
            wide = [t[start:end].double().cpu() for t in (before, x)]
            part = mapped(parts[slot][kind], lambda t: t.to(dtype).double() if t.is_floating_point() else t)
            if kind == 0:  # sparse values stay float32
                part = mapped(parts[slot][kind], lambda t: t.double() if t.is_floating_point() else t)
            expected = apply(*wide, part)
            # Sums of 256 terms of size 1; the bottleneck's inner values are rounded on the way.
            bound = {torch.float32: 4e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
            torch.testing.assert_close(y[start:end].double().cpu(), expected, rtol=bound, atol=bound * 4)


def test_tiles_in_a_captured_graph() -> None:
    """Captured with one adapter, replayed with another that came later."""
    device = torch.device("cuda")
    sites: list[Any] = [sparse_site(256, 256, device), rows_site(torch.bfloat16, device)]
    sites.append(branch_site(torch.bfloat16, device, lambda held: None))
    assert all(site.graphed for site in sites)
    x, y = normal(16, 256, dtype=torch.bfloat16), torch.empty(16, 256, device="cuda", dtype=torch.bfloat16)

    def run(step: Segments) -> Tensor:
        y.copy_(x)
        for site in sites:
            site.apply(y, x, step)
        return y

    def put(slot: int) -> None:
        for site, part in zip(sites, tiled_parts(slot), strict=True):
            site.put(slot, site.prepare(part))

    buffer = TileBuffer(16, 8, device, [(1, 0, 16)])
    step = Segments.over(buffer, device)
    put(1)
    run(step)
    generation = workspace(device).generation
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(step)
    put(2)
    for runs in ([(1, 0, 7), (2, 9, 12)], [(2, 3, 16)], []):
        buffer.fill(runs)
        graph.replay()
        got = y.clone()
        slots = [next((slot for slot, start, end in runs if start <= t < end), 0) for t in range(16)]
        assert torch.equal(got, run(Segments.build(slots, [1] * 16, device)))
    assert workspace(device).generation == generation
