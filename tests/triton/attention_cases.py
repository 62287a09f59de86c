"""Batches over a paged cache that hold what a step can hold, and exact attention over them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftmux.kernels.attention import AttentionRows


@dataclass(frozen=True)
class Request:
    """The last `queries` of `context` tokens. Tokens of a span [start, stop) see each other both ways."""

    queries: int
    context: int
    prefix: bool = False
    """Its first PREFIX tokens lie in blocks that it shares with others, whose table is longer than it needs."""
    spans: tuple[tuple[int, int], ...] = ()

    def sees(self) -> list[int]:
        """How many keys each query sees."""
        at = range(self.context - self.queries, self.context)
        return [next((stop for start, stop in self.spans if start <= i < stop), i + 1) for i in at]

    def pieces(self) -> list[tuple[int, int]]:
        """(queries, context) of the rows that it is to attention."""
        found: list[tuple[int, int]] = []
        joins = False
        for i, keys in zip(range(self.context - self.queries, self.context), self.sees(), strict=True):
            inside = any(start <= i < stop for start, stop in self.spans)
            if inside or not found or not joins:
                found.append((1, keys))
            else:
                found[-1] = (found[-1][0] + 1, keys)
            joins = not inside
        return found


PREFIX = 16

MIXES: dict[str, list[Request]] = {
    "decode": [Request(1, n) for n in (1, 15, 16, 17, 31, 32, 33, 65)],
    "chunks": [Request(3, 20), Request(17, 33), Request(1, 1), Request(40, 40), Request(16, 100)],
    "everything": [
        Request(1, 40, prefix=True),
        Request(1, 1),
        Request(1, 40, prefix=True),
        Request(9, 30, prefix=True),
        Request(22, 25, spans=((5, 16),)),
        Request(30, 30, spans=((0, 1), (7, 12), (12, 20))),
        Request(1, 17),
        Request(5, 5),
    ],
    "long": [Request(1, 256), Request(1, 257), Request(1, 700, prefix=True), Request(3, 600), Request(20, 530)],
    "empty": [],
}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 17},
    "window of one": {"window": 1},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 13, "softcap": 30.0, "sinks": True},
}


@dataclass
class Case:
    """Tensors on one device; the cache and the queries past the last row are nan wherever nobody may look."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    requests: list[Request]
    tables: list[list[int]]
    rows: AttentionRows
    options: dict[str, Any]
    slots: list[list[int]] = field(default_factory=list)

    def run(self, path: Any, rows: AttentionRows | None = None) -> Tensor:
        out = path.attend(self.q, self.k_cache, self.v_cache, self.rows if rows is None else rows, **self.options)
        assert isinstance(out, Tensor)
        return out

    def alone(self, request: int) -> tuple[Case, slice]:
        """One request as a batch of its own, and where its tokens are in this one."""
        start = sum(r.queries for r in self.requests[:request])
        own = slice(start, start + self.requests[request].queries)
        rows = rows_of([self.requests[request]], [self.tables[request]], self.q.device)
        chosen = [self.requests[request]], [self.tables[request]], rows, self.options
        return Case(self.q[own], self.k_cache, self.v_cache, *chosen), own


def rows_of(requests: list[Request], tables: list[list[int]], device: torch.device | str) -> AttentionRows:
    pieces = [(piece, table) for request, table in zip(requests, tables, strict=True) for piece in request.pieces()]
    return AttentionRows.build(
        [piece[0] for piece, _ in pieces], [piece[1] for piece, _ in pieces], [table for _, table in pieces], device
    )


def make_case(
    shape: tuple[int, int, int, int, int],
    requests: list[Request],
    options: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    padding: int = 3,
) -> Case:
    """shape: query heads, key/value heads, key width, value width, block size. `padding` tokens are no row's."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    heads, kv_heads, key_dim, value_dim, block = shape
    shared = -(-PREFIX // block)
    needed = [-(-r.context // block) + 2 for r in requests]
    free = torch.randperm(sum(needed) + shared + 5, generator=generator).tolist()
    k_cache = torch.full((len(free), block, kv_heads, key_dim), torch.nan, dtype=dtype, device=device)
    v_cache = torch.full((len(free), block, kv_heads, value_dim), torch.nan, dtype=dtype, device=device)
    prefix = [free.pop() for _ in range(shared)]
    tables = []
    for request, count in zip(requests, needed, strict=True):
        own = [free.pop() for _ in range(count)]
        table = prefix + own[shared:] if request.prefix else own
        for cache, dim in ((k_cache, key_dim), (v_cache, value_dim)):
            index = torch.tensor([table[j // block] * block + j % block for j in range(request.context)], device=device)
            flat = cache.view(-1, kv_heads, dim)
            written = flat[index].isnan()
            flat[index] = torch.where(written, randn(request.context, kv_heads, dim), flat[index])
        tables.append(table)
    total = sum(r.queries for r in requests)
    q = randn(total + padding, heads, key_dim)
    q[total:] = torch.nan
    chosen = {"scale": key_dim**-0.5, **options}
    if chosen.get("sinks"):
        chosen["sinks"] = torch.randn(heads, generator=generator).to(device)
    return Case(q, k_cache, v_cache, requests, tables, rows_of(requests, tables, device), chosen)


def exact(case: Case) -> tuple[Tensor, float]:
    """In float64, query by query; -> (the output [T, H, Dv], the largest value that a query can see)."""
    tokens, heads, _ = case.q.shape
    block, kv_heads = case.k_cache.shape[1:3]
    window, cap, sinks = (case.options.get(name) for name in ("window", "softcap", "sinks"))
    out = torch.zeros(tokens, heads, case.v_cache.shape[3], dtype=torch.float64, device=case.q.device)
    largest, token = 0.0, 0
    for request, table in zip(case.requests, case.tables, strict=True):
        index = [table[j // block] * block + j % block for j in range(request.context)]
        k, v = (cache.flatten(0, 1)[index].double() for cache in (case.k_cache, case.v_cache))
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        largest = max(largest, v.abs().max().item())
        for keys in request.sees():
            low = max(0, keys - window) if window else 0
            scores = torch.einsum("hd,jhd->hj", case.q[token].double(), k[low:keys]) * case.options["scale"]
            if cap:
                scores = cap * torch.tanh(scores / cap)
            top = scores.max(1, keepdim=True).values
            weights = (scores - top).exp()
            total = weights.sum(1, keepdim=True)
            if sinks is not None:
                total = total + (sinks.double()[:, None] - top).exp()
            out[token] = torch.einsum("hj,jhd->hd", weights / total, v[low:keys])
            token += 1
    return out, largest


def bound(expected: Tensor, largest: float, dtype: torch.dtype) -> Tensor:
    """float32: 4e-6 of the largest value, some units of rounding of the sums and exponentials. Narrower dtypes: one
    unit of rounding of the result, and one of every weight, whose sum is 1."""
    unit = torch.finfo(dtype).eps / 2 if dtype is not torch.float32 else 0.0
    return unit * (expected.abs() + largest) + 4e-6 * largest


def check(case: Case, got: Tensor) -> None:
    """The result is the exact one, and tokens past the last row are zero."""
    expected, largest = exact(case)
    assert got.dtype is case.q.dtype
    error = (got.double() - expected).abs() - bound(expected, largest, got.dtype)
    assert bool((error <= 0).all()), error.max()
    tokens = case.rows.num_tokens
    assert torch.equal(got[tokens:], torch.zeros_like(got[tokens:]))
