"""The gathered operator against its definition, in float64, over the adapter mixes that a batch can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from peftmux.kernels.lowrank import LinearPart, LowRankSite, Segments, apply_linear_part

DTYPES = [torch.float32, torch.bfloat16]
IN = 63
SLICES = (60, 130, 5)

# Of each adapter: the ranks of the slices (None: the slice is left alone) and what its epilogue has.
ADAPTERS: dict[int, tuple[tuple[int | None, ...], str]] = {
    1: ((8, 8, 8), ""),
    2: ((16, 0, 3), "scale"),
    3: ((0, 0, 0), "scale+bias"),
    4: ((64, 33, 1), ""),
    5: ((1, None, 7), "bias"),
    6: ((None, 4, None), ""),
    7: ((64, 64, 64), "scale+bias"),
    12: ((16, 16, 16), ""),
}

# (adapter of each row, tokens of each row)
MIXES: dict[str, tuple[Sequence[int], Sequence[int]]] = {
    "identical": ([1] * 9, [1] * 9),
    "distinct": ([1, 2, 3, 4, 5, 6, 7, 12], [1] * 8),
    "zipf": ([1, 1, 1, 1, 1, 4, 1, 4, 4, 2, 12, 1, 6, 0, 1, 0], [1] * 12 + [2, 3, 1, 5]),
    "base only": ([0, 0, 0], [1, 1, 5]),
    "empty": ([], []),
    "prefill beside decode": ([0, 5, 5, 7, 5, 0, 7, 1], [1, 1, 1, 1, 63, 60, 7, 97]),
    "not resident here": ([99, 1, 8], [1, 2, 3]),
    "wide stack": ([4, 7, 12, 1, 4, 7], [1, 2, 1, 1, 3, 1]),
}


def make_parts(slot: int) -> list[LinearPart | None]:
    generator = torch.Generator().manual_seed(slot)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ranks, epilogue = ADAPTERS[slot]
    parts: list[LinearPart | None] = []
    for rank, out in zip(ranks, SLICES, strict=True):
        if rank is None:
            parts.append(None)
            continue
        low_rank = {"a": random(rank, IN) / IN**0.5, "b": random(out, rank), "scale": 0.3 * slot} if rank else {}
        parts.append(
            LinearPart(
                **low_rank,
                out_scale=random(out) if "scale" in epilogue else None,
                bias=random(out) if "bias" in epilogue else None,
            )
        )
    return parts


def make_site(dtype: torch.dtype, slots: Sequence[int] = tuple(ADAPTERS)) -> LowRankSite:
    site = LowRankSite(IN, SLICES, dtype)
    for slot in slots:
        site.put(slot, site.prepare(make_parts(slot)))
    return site


def batch(tokens: int, dtype: torch.dtype, padding: int = 3) -> tuple[Tensor, Tensor]:
    """-> y and x with rows past the batch's end that hold nan and must stay as they are."""
    torch.manual_seed(tokens)
    y, x = torch.randn(tokens + padding, sum(SLICES)), torch.randn(tokens + padding, IN)
    y[tokens:], x[tokens:] = torch.nan, torch.nan
    return y.to(dtype), x.to(dtype)


def exact(y: Tensor, x: Tensor, segments: Segments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """-> (what the definition gives in float64 with weights rounded to dtype, the sum of its terms' magnitudes)."""
    out, size = y.double(), y.double().abs()
    for slot, start, end in segments.runs:
        if slot not in ADAPTERS:
            continue
        for part, columns in zip(make_parts(slot), torch.arange(sum(SLICES)).split(SLICES), strict=True):
            if part is None:
                continue
            rounded = dataclasses.replace(
                part,
                a=None if part.a is None else part.a.to(dtype).double(),
                b=None if part.b is None else part.b.to(dtype).double(),
            )
            at = (slice(start, end), slice(int(columns[0]), int(columns[-1]) + 1))
            out[at] = apply_linear_part(out[at], x[start:end].double(), rounded)
            magnitudes = dataclasses.replace(
                rounded,
                a=None if rounded.a is None else rounded.a.abs(),
                b=None if rounded.b is None else rounded.b.abs(),
                out_scale=None if part.out_scale is None else part.out_scale.abs(),
                bias=None if part.bias is None else part.bias.abs(),
            )
            size[at] = apply_linear_part(size[at], x[start:end].double().abs(), magnitudes)
    return out, size


def tolerance(expected: Tensor, size: Tensor, dtype: torch.dtype, path: str) -> Tensor:
    """float32: 1e-6 of the terms' magnitudes, some units of rounding of a sum of about a hundred terms.

    bfloat16 has 8 significant bits, so its one rounding adds at most 2^-8 of the result. The torch path also rounds the
    product with A, and that product scaled: twice 2^-8 of what passes through it.
    """
    bound = 1e-6 * size
    if dtype is torch.bfloat16:
        bound = bound + 2**-8 * expected.abs() + (2**-7 * size if path == "torch" else 0)
    return bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_every_path_computes_the_definition(path: str, mix: str, dtype: torch.dtype) -> None:
    site = make_site(dtype)
    assert site.path == path
    segments = Segments.build(*MIXES[mix])
    y, x = batch(segments.num_tokens, dtype)
    expected, size = exact(y, x, segments, dtype)
    got = y.clone()
    site.apply(got, x, segments)
    own, past = slice(0, segments.num_tokens), slice(segments.num_tokens, None)
    error = (got[own].double() - expected[own]).abs()
    assert bool((error <= tolerance(expected[own], size[own], dtype, path)).all()), error.max()
    assert bool(got[past].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_an_adapter_keep_their_bits(path: str, dtype: torch.dtype) -> None:
    site = make_site(dtype)
    segments = Segments.build([0, 7, 0, 99, 1, 0], [2, 3, 1, 2, 1, 4])
    y, x = batch(segments.num_tokens, dtype)
    got = y.clone()
    site.apply(got, x, segments)
    untouched = torch.tensor([0, 1, 5, 6, 7, 9, 10, 11, 12])
    changed = torch.tensor([2, 3, 4, 8])
    assert torch.equal(got[untouched], y[untouched])
    assert bool((got[changed] != y[changed]).any(dim=1).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_rows_do_not_depend_on_their_neighbours(native_path: str, dtype: torch.dtype) -> None:
    site = make_site(dtype)
    slots, lens = MIXES["prefill beside decode"]
    segments = Segments.build(slots, lens)
    y, x = batch(segments.num_tokens, dtype)
    together = y.clone()
    site.apply(together, x, segments)
    again = y.clone()
    site.apply(again, x, dataclasses.replace(segments, threads=1 if segments.threads > 1 else 2))
    assert torch.equal(again[: segments.num_tokens], together[: segments.num_tokens])
    for slot, start, end in segments.runs:
        for token in range(start, end, 5):
            alone = y[token : token + 1].clone()
            site.apply(alone, x[token : token + 1], Segments.build([slot], [1]))
            assert torch.equal(alone[0], together[token])


def test_adapters_come_and_go(path: str) -> None:
    site = make_site(torch.float32, slots=[])
    segments = Segments.build([1, 12, 1], [2, 2, 2])
    y, x = batch(6, torch.float32, padding=0)
    assert site.empty
    prepared = {slot: site.prepare(make_parts(slot)) for slot in (1, 12)}
    results = []
    for put, drop in (((), ()), ((12,), ()), ((1,), ()), ((), (12,)), ((12,), ()), ((), (1, 12))):
        for slot in put:
            site.put(slot, prepared[slot])
        for slot in drop:
            site.drop(slot)
        got = y.clone()
        site.apply(got, x, segments)
        results.append(got)
    assert site.empty
    assert not site.has(1)
    assert torch.equal(results[0], y)
    assert torch.equal(results[5], y)
    assert torch.equal(results[1][:2], y[:2])
    assert not torch.equal(results[1][2:4], y[2:4])
    torch.testing.assert_close(results[2][2:4], results[1][2:4])
    assert torch.equal(results[3][2:4], y[2:4])
    torch.testing.assert_close(results[4], results[2])


def test_an_adapter_outside_the_batch_is_not_read(path: str) -> None:
    site = make_site(torch.float32, slots=[1])
    poisoned = site.prepare(make_parts(12))
    site.put(12, poisoned)
    poisoned.a.fill_(torch.nan)
    poisoned.b.fill_(torch.nan)
    y, x = batch(4, torch.float32, padding=0)
    site.apply(y, x, Segments.build([1, 0, 1], [1, 1, 2]))
    assert bool(y.isfinite().all())


def test_rows_of_y_may_stand_apart(path: str) -> None:
    site = make_site(torch.float32)
    segments = Segments.build([7, 1], [2, 5])
    y, x = batch(7, torch.float32, padding=0)
    expected = y.clone()
    site.apply(expected, x, segments)
    wide = torch.cat([y, torch.full((7, 9), torch.nan)], dim=1)
    site.apply(wide[:, : sum(SLICES)], x, segments)
    torch.testing.assert_close(wide[:, : sum(SLICES)], expected)
    assert bool(wide[:, sum(SLICES) :].isnan().all())


def test_preparing_says_what_is_wrong() -> None:
    site = LowRankSite(IN, (4, 5), torch.float32)
    good = LinearPart(a=torch.ones(2, IN), b=torch.ones(4, 2))
    with pytest.raises(ValueError, match="expected 2 parts, one per slice, got 1"):
        site.prepare([good])
    with pytest.raises(ValueError, match=r"slice 1: expected b of shape \(5, 2\), got \(4, 2\)"):
        site.prepare([good, good])
    with pytest.raises(ValueError, match=r"slice 0: expected a of shape \(2, 63\), got \(2, 62\)"):
        site.prepare([dataclasses.replace(good, a=torch.ones(2, 62)), None])
    with pytest.raises(ValueError, match="expected a and b together"):
        site.prepare([LinearPart(b=torch.ones(4, 2)), None])
    with pytest.raises(ValueError, match="expected finite values, got inf or nan in b"):
        site.prepare([dataclasses.replace(good, b=torch.full((4, 2), torch.inf)), None])
    with pytest.raises(ValueError, match=r"inf or nan in a as torch\.bfloat16"):
        LowRankSite(IN, (4,), torch.bfloat16).prepare([dataclasses.replace(good, a=torch.full((2, IN), 3.4e38))])


def test_applying_says_what_is_wrong(path: str) -> None:
    site = make_site(torch.float32)
    y, x = batch(4, torch.float32, padding=0)
    segments = Segments.build([1], [4])
    with pytest.raises(ValueError, match=r"expected y \[T, 195\] and x \[T, 63\] in torch\.float32, got"):
        site.apply(y.bfloat16(), x.bfloat16(), segments)
    with pytest.raises(ValueError, match="got"):
        site.apply(y[:, 1:], x, segments)
    with pytest.raises(ValueError, match="expected at least 5 rows"):
        site.apply(y, x, Segments.build([1], [5]))
    with pytest.raises(ValueError, match="a free slot of at least 1, got 0"):
        site.put(0, site.prepare(make_parts(1)))
    with pytest.raises(ValueError, match="a free slot of at least 1, got 7"):
        site.put(7, site.prepare(make_parts(7)))


def test_segments_join_neighbours_and_leave_the_base_out() -> None:
    segments = Segments.build([3, 3, 0, 3, 1, 1], [1, 2, 4, 1, 0, 2])
    assert segments.runs == ((3, 0, 3), (3, 7, 8), (1, 8, 10))
    assert segments.num_tokens == 10
    assert segments.slots == (1, 3)
    assert segments.slot_of_token.tolist() == [3, 3, 3, 0, 0, 0, 0, 3, 1, 1]
    with pytest.raises(ValueError, match="expected one length for each of 2 rows, got 1"):
        Segments.build([1, 2], [1])
    with pytest.raises(ValueError, match="got slot -1 of length 1"):
        Segments.build([-1], [1])


def test_an_adapter_is_charged_for_its_tensors() -> None:
    site = make_site(torch.bfloat16)
    ranks, _ = ADAPTERS[2]
    low_rank = sum(r * (IN + n) * 2 + 4 * r for r, n in zip(ranks, SLICES, strict=True) if r)
    assert site.bytes(2) == low_rank + 2 * 4 * sum(SLICES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", [False, True])
def test_gated_experts_compute_the_definition(path: str, dtype: torch.dtype, epilogue: bool) -> None:
    """Beside adapters without a gate; the definition written out here expert by expert, in float64."""
    torch.manual_seed(5)
    experts, ranks = (3, 0, 4), (6, 5, 8)
    site = make_site(dtype, slots=(1, 3))
    made = [
        LinearPart(
            torch.randn(r, IN) / 8,
            torch.randn(n, r),
            0.7,
            out_scale=torch.randn(n) if epilogue else None,
            bias=torch.randn(n) if epilogue else None,
            gate=torch.randn(e, IN) / 4 if e else None,
        )
        for e, r, n in zip(experts, ranks, SLICES, strict=True)
    ]
    site.put(9, site.prepare(made))
    assert site.path == path
    segments = Segments.build([0, 9, 1, 9, 3, 9], [2, 1, 3, 100, 2, 2])
    y, x = batch(segments.num_tokens, dtype)
    got = y.clone()
    site.apply(got, x, segments)
    others = segments.slot_of_token != 9
    alone = make_site(dtype, slots=(1, 3))
    plain = y.clone()
    alone.apply(plain, x, segments)
    assert torch.equal(got[: len(others)][others], plain[: len(others)][others])
    own = torch.nonzero(~others).flatten()
    for part, columns in zip(made, torch.arange(sum(SLICES)).split(SLICES), strict=True):
        want, size = written_out(y[own][:, columns], x[own], part, dtype)
        error = (got[own][:, columns].double() - want).abs()
        assert bool((error <= tolerance(want, 4 * size, dtype, path)).all()), error.max()
        if dtype is torch.float32:
            reference = apply_linear_part(y[own][:, columns].double(), x[own].double(), in_double(part))
            torch.testing.assert_close(reference, want)


def in_double(part: LinearPart) -> LinearPart:
    pieces = (part.a, part.b, part.out_scale, part.bias, part.gate)
    a, b, out_scale, bias, gate = (None if t is None else t.double() for t in pieces)
    return LinearPart(a, b, part.scale, out_scale, bias, gate)


def written_out(y: Tensor, x: Tensor, part: LinearPart, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """-> (the definition expert by expert in float64 with weights rounded to dtype, its terms' magnitudes)."""
    assert part.a is not None
    assert part.b is not None
    a, b, x = part.a.to(dtype).double(), part.b.to(dtype).double(), x.double()
    count = part.experts or 1
    shares = torch.ones(len(x), 1).double()
    if part.gate is not None:
        shares = (x @ part.gate.to(dtype).double().T).softmax(1)
    out, size = y.double(), y.double().abs()
    for e, (a_e, b_e) in enumerate(zip(a.chunk(count), b.chunk(count, 1), strict=True)):
        out = out + part.scale * shares[:, e : e + 1] * (x @ a_e.T @ b_e.T)
        size = size + part.scale * shares[:, e : e + 1] * (x.abs() @ a_e.abs().T @ b_e.abs().T)
    if part.out_scale is not None:
        out, size = out * part.out_scale, size * part.out_scale.abs()
    return (out, size) if part.bias is None else (out + part.bias, size + part.bias.abs())


def test_a_gate_needs_ranks_that_its_experts_share() -> None:
    site = LowRankSite(IN, (7,), torch.float32)
    a, b, gate = torch.randn(5, IN), torch.randn(7, 5), torch.randn(2, IN)
    with pytest.raises(ValueError, match="2 experts share, got 5"):
        site.prepare([LinearPart(a, b, gate=gate)])
    with pytest.raises(ValueError, match="2 experts share, got 0"):
        site.prepare([LinearPart(gate=gate)])
    with pytest.raises(ValueError, match="gate of shape"):
        site.prepare([LinearPart(a[:4], b[:, :4], gate=gate[:, :3])])
