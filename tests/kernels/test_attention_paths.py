"""Paged attention: every form against the definition, and the definition against a dense softmax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from peftmux.kernels.attention import (
    AttentionPath,
    AttentionRows,
    choose_attention,
    copy_blocks,
    paged_attention,
    write_kv,
)

DTYPES = [torch.float32, torch.bfloat16]

# heads, key/value heads, key dimension, value dimension, block size
SHAPES = {
    "multi-head": (4, 4, 32, 32, 16),
    "grouped": (6, 2, 64, 64, 16),
    "one key head": (5, 1, 80, 80, 8),
    "other value width": (4, 2, 63, 60, 16),
    "wide": (2, 1, 256, 130, 32),
    "many queries a key": (40, 1, 16, 24, 1),
}

# (query lengths, context lengths): decode rows first
BATCHES: dict[str, tuple[Sequence[int], Sequence[int]]] = {
    "decode": ([1] * 9, [1, 15, 16, 17, 31, 32, 33, 64, 65]),
    "one row": ([1], [63]),
    "prefill": ([5, 16, 60, 1, 63], [5, 16, 60, 1, 63]),
    "chunks": ([3, 17, 40], [20, 33, 100]),
    "mixed": ([1, 1, 1, 33, 1, 2], [40, 1, 129, 33, 60, 48]),
    "empty": ([], []),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 17},
    "window of one": {"window": 1},
    "no window": {"window": 0},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 33, "softcap": 5.0, "sinks": True},
}


@dataclasses.dataclass
class Case:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    rows: AttentionRows
    keys: list[Tensor]
    values: list[Tensor]
    options: dict[str, Any]

    def run(self, path: AttentionPath) -> Tensor:
        return path.attend(self.q, self.k_cache, self.v_cache, self.rows, **self.options)

    def expected(self) -> Tensor:
        """The definition in float32, of the same inputs."""
        return paged_attention(self.q.float(), self.k_cache.float(), self.v_cache.float(), self.rows, **self.options)


def make_case(
    shape: tuple[int, int, int, int, int],
    batch: tuple[Sequence[int], Sequence[int]],
    options: Mapping[str, Any],
    dtype: torch.dtype,
    padding: int = 3,
) -> Case:
    """Rows over shuffled blocks of a cache that holds nan wherever no row has a key; tables have a tail."""
    torch.manual_seed(0)
    heads, kv_heads, key_dim, value_dim, block = shape
    queries, contexts = batch
    blocks = sum(-(-n // block) + 2 for n in contexts) + 5
    free = torch.randperm(blocks).tolist()
    tables = [[free.pop() for _ in range(-(-n // block) + 2)] for n in contexts]
    k_cache = torch.full((blocks, block, kv_heads, key_dim), torch.nan, dtype=dtype)
    v_cache = torch.full((blocks, block, kv_heads, value_dim), torch.nan, dtype=dtype)
    keys = [torch.randn(n, kv_heads, key_dim).to(dtype) for n in contexts]
    values = [torch.randn(n, kv_heads, value_dim).to(dtype) for n in contexts]
    for table, k, v in zip(tables, keys, values, strict=True):
        slots = torch.tensor([table[j // block] * block + j % block for j in range(len(k))])
        write_kv(k, v, k_cache, v_cache, slots)
    q = torch.randn(sum(queries) + padding, heads, key_dim).to(dtype)
    q[sum(queries) :] = torch.nan
    chosen = {"scale": key_dim**-0.5, **options}
    if chosen.get("sinks"):
        chosen["sinks"] = torch.randn(heads)
    return Case(q, k_cache, v_cache, AttentionRows.build(queries, contexts, tables), keys, values, chosen)


def check(got: Tensor, case: Case, path: str) -> None:
    """float32: 2e-6 of the largest value, some units of rounding of the sums and the exponentials.

    bfloat16 has 8 significant bits: one rounding of the result adds at most 2^-8 of it. torch's own attention also
    rounds the weights, whose sum is 1, and on some paths the scores' products: 2^-7 of the largest value.
    """
    expected = case.expected()
    largest = max((v.float().abs().max().item() for v in case.values), default=0.0)
    bound = torch.full_like(expected, 2e-6 * largest)
    if got.dtype is torch.bfloat16:
        bound += 2**-8 * expected.abs() + (2**-7 * largest if path == "torch" else 0)
    error = (got.float() - expected).abs()
    assert bool((error <= bound).all()), (error - bound).max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("batch", BATCHES)
def test_every_path_computes_the_definition(path: str, batch: str, options: str, dtype: torch.dtype) -> None:
    chosen = choose_attention("cpu", dtype)
    assert chosen.name == path
    case = make_case(SHAPES["grouped"], BATCHES[batch], OPTIONS[options], dtype)
    check(case.run(chosen), case, path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(path: str, shape: str, options: str, dtype: torch.dtype) -> None:
    case = make_case(SHAPES[shape], BATCHES["mixed"], OPTIONS[options], dtype)
    check(case.run(choose_attention("cpu", dtype)), case, path)


@pytest.mark.parametrize("options", ["plain", "window of one", "all"])
def test_long_contexts(path: str, options: str) -> None:
    """Longer than what the native path gives one unit of work, and its edges."""
    batch = ([1, 1, 1, 1, 9], [1023, 1024, 1025, 2100, 2100])
    shape = (4, 2, 16, 16, 32)
    for window in (None, 1500):
        options_here = {**OPTIONS[options], **({"window": window} if window else {})}
        case = make_case(shape, batch, options_here, torch.float32)
        check(case.run(choose_attention("cpu", torch.float32)), case, path)


def test_long_prompts(path: str) -> None:
    """Rows of more queries than the native path computes itself where the CPU has matrix tiles."""
    batch = ([1, 129, 128, 200], [40, 129, 300, 333])
    for options in ("plain", "window", "all"):
        case = make_case(SHAPES["grouped"], batch, OPTIONS[options], torch.bfloat16)
        check(case.run(choose_attention("cpu", torch.bfloat16)), case, "torch")


def test_large_scores_do_not_overflow(path: str) -> None:
    case = make_case(SHAPES["grouped"], BATCHES["mixed"], {"scale": 500.0}, torch.float32)
    got = case.run(choose_attention("cpu", torch.float32))
    expected = case.expected()
    # A score of some 1e4 is known to 1e-3 only, so weights are known to that; what must hold is that nothing is lost.
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-2)


def test_the_definition_is_dense_attention() -> None:
    """Row by row, with its own loop over heads: nothing shared with the code under test."""
    case = make_case(SHAPES["grouped"], BATCHES["mixed"], OPTIONS["all"], torch.float32)
    got, start = case.expected(), 0
    window, cap, scale = case.options["window"], case.options["softcap"], case.options["scale"]
    for row, (k, v) in enumerate(zip(case.keys, case.values, strict=True)):
        queries = case.rows.query_lens[row]
        for i in range(queries):
            at = len(k) - queries + i
            first = max(0, at - window + 1)
            for head in range(6):
                score = k[first : at + 1, head // 3].double() @ case.q[start + i, head].double() * scale
                score = cap * torch.tanh(score / cap)
                weights = score.exp() / (score.exp().sum() + case.options["sinks"][head].double().exp())
                torch.testing.assert_close(
                    got[start + i, head].double(), weights @ v[first : at + 1, head // 3].double(), rtol=0, atol=2e-6
                )
        start += queries
    assert torch.equal(got[start:], torch.zeros_like(got[start:]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ["plain", "all"])
def test_native_rows_do_not_depend_on_neighbours_or_threads(native_path: str, options: str, dtype: torch.dtype) -> None:
    chosen = choose_attention("cpu", dtype)
    case = make_case((6, 2, 48, 40, 16), ([1, 1, 1, 40, 13], [1500, 30, 64, 40, 90]), OPTIONS[options], dtype)
    together = case.run(chosen)
    rows = case.rows
    case.rows = dataclasses.replace(rows, threads=1 if rows.threads > 1 else 2)
    assert torch.equal(case.run(chosen), together)
    case.q = case.q.clone()
    for row, start in enumerate(rows.query_starts[:-1]):
        case.rows = AttentionRows.build(
            [rows.query_lens[row]], [rows.context_lens[row]], [rows.table[row, 2:].tolist()]
        )
        whole = case.q
        case.q = whole[start : rows.query_starts[row + 1]]
        assert torch.equal(case.run(chosen), together[start : rows.query_starts[row + 1]])
        case.q = whole


def test_native_chunks_give_the_bits_of_the_whole(native_path: str) -> None:
    """A prompt in one piece, in chunks, and token by token: the same result, so that a prefix hit changes nothing."""
    chosen = choose_attention("cpu", torch.bfloat16)
    case = make_case(SHAPES["grouped"], ([90], [90]), {}, torch.bfloat16, padding=0)
    whole, table = case.run(chosen), case.rows.table[0, 2:].tolist()
    for step in (1, 7, 32):
        pieces = []
        for start in range(0, 90, step):
            end = min(90, start + step)
            piece = dataclasses.replace(case, q=case.q[start:end])
            piece.rows = AttentionRows.build([end - start], [end], [table])
            pieces.append(piece.run(chosen))
        assert torch.equal(torch.cat(pieces), whole)


def test_queries_may_stand_apart(path: str) -> None:
    """As a slice of a fused projection does."""
    case = make_case(SHAPES["grouped"], BATCHES["mixed"], {}, torch.float32)
    chosen = choose_attention("cpu", torch.float32)
    expected = case.run(chosen)
    fused = torch.cat([case.q.flatten(1), torch.full((case.q.shape[0], 7), torch.nan)], dim=1)
    case.q = fused[:, : 6 * 64].view(-1, 6, 64)
    assert not case.q.is_contiguous()
    torch.testing.assert_close(case.run(chosen), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_written_keys_are_where_they_belong(path: str, dtype: torch.dtype) -> None:
    fused = torch.randn(5, 3 * 8 + 3 * 6).to(dtype)
    k, v = fused[:, :24].view(5, 3, 8), fused[:, 24:].view(5, 3, 6)
    k_cache, v_cache = torch.zeros(4, 4, 3, 8, dtype=dtype), torch.zeros(4, 4, 3, 6, dtype=dtype)
    slots = torch.tensor([15, 0, 7, 8, 3])
    choose_attention("cpu", dtype).write_kv(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache.view(16, 3, 8)[slots], k)
    assert torch.equal(v_cache.view(16, 3, 6)[slots], v)
    others = torch.ones(16, dtype=torch.bool)
    others[slots] = False
    assert not k_cache.view(16, 3, 8)[others].any()
    assert not v_cache.view(16, 3, 6)[others].any()


def test_blocks_are_read_before_any_is_written() -> None:
    k_cache = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 2, 1, 3).clone()
    v_cache = k_cache[..., :2] + 10
    copy_blocks(k_cache, v_cache, torch.tensor([(0, 1), (1, 2)]))
    assert k_cache[:, 0, 0, 0].tolist() == [0, 0, 1, 3]
    assert v_cache[:, 1, 0, 1].tolist() == [10, 10, 11, 13]


@pytest.mark.parametrize("tables", [((7,), (3, 1, 4), (1, 5, 9, 2, 6)), ((2,), (0, 8), (4, 4))], ids=["grown", "even"])
def test_the_table_holds_every_row_padded(tables: tuple[tuple[int, ...], ...]) -> None:
    rows = AttentionRows.build((1, 1, 3), (4, 6, 8), tables)
    width = max(map(len, tables))
    padded = [[*table, *[0] * (width - len(table))] for table in tables]
    starts, contexts = (0, 1, 2, 5), (4, 6, 8, 0)
    expected = [[*head, *row] for *head, row in zip(starts, contexts, [*padded, [0] * width], strict=True)]
    assert rows.table.dtype is torch.int32
    assert rows.table.tolist() == expected
    assert rows.table.is_contiguous()
    assert AttentionRows.build((), (), ()).table.tolist() == [[0, 0]]


@pytest.mark.parametrize("window", [0, 3])
def test_masks_are_made_once_for_all_layers(window: int) -> None:
    rows = AttentionRows.build((1, 1, 3), (5, 2, 7), ((1, 2), (3,), (4, 5)))
    decode, prefill = rows.seen(0, 2, window, 4), rows.seen(2, 3, window, 4)
    assert rows.seen(0, 2, window, 4) is decode
    assert rows.seen(2, 3, window, 4) is prefill
    for first, seen in ((0, decode), (2, prefill)):
        _, positions = rows.gather(first, first + len(seen), window, 4)
        for r, row in enumerate(seen.tolist()):
            for i, query in enumerate(row):
                at = rows.context_lens[first + r] - len(row) + i
                keys = [p for p, sees in zip(positions[r].tolist(), query, strict=True) if sees]
                assert keys == list(range(max(0, at - window + 1) if window else 0, at + 1))


def test_building_rows_says_what_is_wrong() -> None:
    rows = AttentionRows.build([1, 1, 3, 1], [4, 1, 3, 9], [[1], [2, 0], [3], [4]])
    assert (rows.num_decode, rows.num_tokens, rows.query_starts) == (2, 6, (0, 1, 2, 5, 6))
    with pytest.raises(ValueError, match="each of 2 rows, got 1 and 2"):
        AttentionRows.build([1, 1], [1], [[0], [1]])
    with pytest.raises(ValueError, match="row 1: expected 1 <= query_len <= context_len, got 3 and 2"):
        AttentionRows.build([1, 3], [1, 2], [[0], [1]])


def test_native_attention_says_what_is_wrong(native_path: str) -> None:
    case = make_case(SHAPES["grouped"], BATCHES["decode"], {}, torch.float32, padding=0)
    chosen = choose_attention("cpu", torch.float32)
    with pytest.raises(ValueError, match=r"expected torch\.float32, got torch\.bfloat16"):
        dataclasses.replace(case, q=case.q.bfloat16()).run(chosen)
    with pytest.raises(ValueError, match="H a multiple of Hkv"):
        dataclasses.replace(case, q=case.q[:, :5]).run(chosen)
    with pytest.raises(ValueError, match=r"T >= 9"):
        dataclasses.replace(case, q=case.q[:8]).run(chosen)
    with pytest.raises(ValueError, match="expected contiguous caches"):
        dataclasses.replace(case, k_cache=case.k_cache.transpose(0, 1).contiguous().transpose(0, 1)).run(chosen)
