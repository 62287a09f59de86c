"""Paged attention in Triton on a CUDA device against exact attention, eagerly and in a captured graph."""

from __future__ import annotations

import pytest
import torch

from peftmux.kernels.attention import AttentionRows, StaticRows, choose_attention
from tests.triton.attention_cases import MIXES, OPTIONS, Case, Request, check, make_case, rows_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LLAMA = (32, 8, 128, 128, 16)

# Each combination is compiled, which is what takes the time.
COMPILED = [(options, torch.bfloat16) for options in OPTIONS] + [("all", torch.float16), ("all", torch.float32)]

# query heads, key/value heads, key width, value width, block size; dtype
SHAPES = {
    "32": ((4, 4, 32, 32, 16), torch.float16),
    "80": ((8, 8, 80, 80, 16), torch.bfloat16),
    "96": ((6, 2, 96, 96, 8), torch.float32),
    "256": ((8, 4, 256, 256, 32), torch.bfloat16),
    "512": ((8, 2, 512, 512, 16), torch.bfloat16),
    "192 and 128": ((4, 4, 192, 128, 16), torch.bfloat16),
    "odd widths": ((4, 2, 63, 60, 16), torch.bfloat16),
    "one key head": ((48, 1, 64, 64, 16), torch.bfloat16),
    "one token a block": ((14, 2, 64, 64, 1), torch.float16),
}


@pytest.mark.parametrize(("options", "dtype"), COMPILED)
def test_every_mix_and_option(options: str, dtype: torch.dtype) -> None:
    path = choose_attention("cuda", dtype)
    assert path.name == "triton"
    for requests in MIXES.values():
        case = make_case(LLAMA, requests, OPTIONS[options], dtype, "cuda")
        check(case, case.run(path))


@pytest.mark.parametrize("shape", list(SHAPES))
def test_every_shape(shape: str) -> None:
    """In one batch, all three kinds of tiles."""
    widths, dtype = SHAPES[shape]
    case = make_case(widths, [*MIXES["everything"], *MIXES["long"]], OPTIONS["all"], dtype, "cuda")
    check(case, case.run(choose_attention("cuda", dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_contexts(dtype: torch.dtype) -> None:
    """As many parts as there can be, prefill on a long past, and tiles of prompts."""
    requests = [Request(1, 20000), Request(1, 8193), Request(5, 9000), Request(100, 8200), Request(700, 700)]
    path = choose_attention("cuda", dtype)
    case = make_case(LLAMA, requests, {}, dtype, "cuda")
    check(case, case.run(path))
    case.options["window"] = 4096
    check(case, case.run(path))


def test_bits_repeat_and_depend_on_nobody_else() -> None:
    requests = [*MIXES["everything"][:5], Request(1, 700), Request(3, 600), Request(30, 90), Request(1, 5000)]
    path = choose_attention("cuda", torch.bfloat16)
    case = make_case(LLAMA, requests, OPTIONS["sinks"], torch.bfloat16, "cuda")
    together = case.run(path)
    for request in range(len(requests)):
        alone, own = case.alone(request)
        assert torch.equal(alone.run(path), together[own]), requests[request]


def test_merging_waits_for_every_part() -> None:
    """More programs than run at once, over and over: a part that was counted before it was there would show."""
    requests = [Request(1, 300 + 37 * i) for i in range(64)]
    path = choose_attention("cuda", torch.bfloat16)
    case = make_case(LLAMA, requests, {}, torch.bfloat16, "cuda")
    first = case.run(path)
    check(case, first)
    for _ in range(200):
        assert torch.equal(case.run(path), first)


def test_a_captured_graph_serves_other_rows() -> None:
    """Captured while it holds no row; replayed with other numbers of rows, contexts and blocks."""
    tokens = 16
    path = choose_attention("cuda", torch.bfloat16)
    requests = [Request(1, 1 + 331 * i) for i in range(tokens)]
    case = make_case(LLAMA, requests, OPTIONS["all"], torch.bfloat16, "cuda", padding=0)
    static = StaticRows.decode(tokens, 320, 16, "cuda")
    out = captured(case, static, path)
    for some in (slice(0, 16), slice(3, 4), slice(0, 0), slice(5, 14)):
        step = make_case(LLAMA, requests[some], {}, torch.bfloat16, "cuda", padding=16 - len(requests[some]))
        rows = rows_of(requests[some], case.tables[some], "cuda")
        case.q.copy_(step.q)
        static.fill(rows)
        out.graph.replay()
        assert torch.equal(out.out, case.run(path, rows))


class captured:
    """A case's attention over static rows as a graph, and where its result is."""

    def __init__(self, case: Case, rows: AttentionRows, path: object) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            case.run(path, rows)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = case.run(path, rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_written_keys_are_where_they_belong(dtype: torch.dtype) -> None:
    path = choose_attention("cuda", dtype)
    for heads, key_dim, value_dim in ((8, 128, 128), (32, 80, 80), (3, 63, 60), (2, 512, 512)):
        fused = torch.randn(7, heads * (key_dim + value_dim), device="cuda").to(dtype)
        k = fused[:, : heads * key_dim].view(7, heads, key_dim)
        v = fused[:, heads * key_dim :].view(7, heads, value_dim)
        k_cache = torch.full((5, 4, heads, key_dim), 7.0, device="cuda").to(dtype)
        v_cache = torch.full((5, 4, heads, value_dim), 7.0, device="cuda").to(dtype)
        slots = torch.tensor([15, 0, -1, 7, 8, 3, 19], device="cuda")
        path.write_kv(k, v, k_cache, v_cache, slots)
        written = slots >= 0
        others = torch.ones(20, dtype=torch.bool, device="cuda")
        others[slots[written]] = False
        for cache, rows in ((k_cache, k), (v_cache, v)):
            flat = cache.flatten(0, 1)
            assert torch.equal(flat[slots[written]], rows[written])
            assert bool((flat[others] == 7).all())


def test_queries_may_stand_apart() -> None:
    path = choose_attention("cuda", torch.bfloat16)
    case = make_case(LLAMA, MIXES["everything"], {}, torch.bfloat16, "cuda")
    expected = case.run(path)
    case.q = torch.cat([case.q.flatten(1), case.q.flatten(1)[:, :9]], dim=1)[:, : 32 * 128].view(-1, 32, 128)
    assert torch.equal(case.run(path), expected)


def test_under_inference_mode() -> None:
    path = choose_attention("cuda", torch.float16)
    with torch.inference_mode():
        case = make_case(LLAMA, MIXES["long"], {}, torch.float16, "cuda")
        check(case, case.run(path))
    check(case, case.run(path))
