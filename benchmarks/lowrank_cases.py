"""What the low-rank benchmark measures, the most important first, and what each case needs at least."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from peftmux.kernels.lowrank import Segments

MIXES = ("distinct", "identical", "zipf", "half")
_ROWS = 64
"""Requests that the tokens of a prefill belong to."""
_ZIPF = 1.5


@dataclass(frozen=True, slots=True)
class Site:
    """Linear layers that read one input of width `width` and write slices side by side."""

    name: str
    width: int
    slices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """mix: "distinct" every request its own adapter, "identical" one adapter, "zipf" adapters drawn by Zipf's law,
    "half" every other request none and the others their own."""

    tokens: int
    rank: int
    mix: str
    site: Site

    @property
    def name(self) -> str:
        return f"{self.tokens} tokens, {self.mix}, r={self.rank}, {self.site.name}"


@dataclass(frozen=True, slots=True)
class Scale:
    tokens: tuple[int, ...]
    """As the other two, the most important first."""
    ranks: tuple[int, ...]
    sites: tuple[Site, ...]
    copies: int
    """Sets of weights and adapters that take turns, so that none is still in a cache."""
    replays: int
    adapters: int
    """At each site; more than the most requests of a case."""
    copied: int
    """Bytes copied to measure the bandwidth."""
    product: int
    """Width of the square product that measures the rate of arithmetic."""


FULL = Scale(
    tokens=(64, 1, 2048, 128, 8, 512, 32, 8192),
    ranks=(16, 64, 8, 128),
    sites=(
        Site("single", 4096, (4096,)),
        Site("qkv", 4096, (4096, 1024, 1024)),
        Site("gate_up", 4096, (14336, 14336)),
    ),
    copies=8,
    replays=20,
    adapters=128,
    copied=1 << 30,
    product=8192,
)
DRY = Scale(
    tokens=(6, 1),
    ranks=(4, 2),
    sites=(Site("single", 48, (32,)), Site("qkv", 48, (32, 16, 16))),
    copies=2,
    replays=2,
    adapters=8,
    copied=1 << 16,
    product=64,
)


def cases(scale: Scale) -> list[Case]:
    """All of them; one that departs from the first in several ways comes after those that depart in one."""
    order = product(enumerate(scale.tokens), enumerate(scale.ranks), enumerate(MIXES), enumerate(scale.sites))
    ranked = sorted(order, key=lambda places: sum(place for place, _ in places))
    return [Case(tokens, rank, mix, site) for (_, tokens), (_, rank), (_, mix), (_, site) in ranked]


def segments(case: Case, shift: int, scale: Scale, device: torch.device) -> Segments:
    """Which adapter each token has, in slots from 1 on; `shift` is another set of adapters of the same mix."""
    requests = case.tokens if case.tokens <= scale.adapters else min(_ROWS, case.tokens)
    chosen = random.Random(f"{case.name} {shift}")
    weights = [n**-_ZIPF for n in range(1, requests + 1)]
    own = [1 + (i + shift * 7) % scale.adapters for i in range(requests)]
    slots: Sequence[int] = {
        "distinct": own,
        "identical": [own[0]] * requests,
        "zipf": chosen.choices(own, weights, k=requests),
        "half": [slot if i % 2 else 0 for i, slot in enumerate(own, 1)],
    }[case.mix]
    lens = [case.tokens // requests + (i < case.tokens % requests) for i in range(requests)]
    return Segments.build(slots, lens, device)


@dataclass(frozen=True, slots=True)
class Rates:
    """Of this device."""

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, moved: int, flops: int) -> float:
        return max(moved / self.bytes_per_second, flops / self.flops_per_second)

    def base(self, case: Case, itemsize: int) -> float:
        """Of the product with the weights: seconds."""
        width, out = case.site.width, sum(case.site.slices)
        moved = (width * out + case.tokens * (width + out)) * itemsize
        return self.seconds(moved, 2 * case.tokens * width * out)

    def lowrank(self, case: Case, step: Segments, itemsize: int) -> float:
        """Of what the adapters add: each one's factors read once, their tokens' x read, y read and written."""
        width, out = case.site.width, sum(case.site.slices)
        tokens = sum(end - start for _, start, end in step.runs)
        factors = len(step.slots) * case.rank * (width * len(case.site.slices) + out)
        flops = 2 * tokens * case.rank * (width * len(case.site.slices) + out)
        return self.seconds((factors + tokens * (width + 2 * out)) * itemsize, flops)


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """One set of adapters with one input: what a form of the operator is built for, and an opponent's `build` is given.

    Its result: for each token i with slot s > 0 and each slice, y[i] += scale * b[s] (a[s] x[i]), in place. A token of
    slot 0 keeps its y. `build` may lay out weights and read the batch as it likes; the callable that it returns is
    captured in a CUDA graph and may do only what a graph can hold. Where it has an attribute `metadata`, a callable
    without arguments, that is what it has to do anew for each step's batch, and is timed by itself.
    """

    x: Tensor
    """[T, width]."""
    y: Tensor
    """[T, sum of slices], what the base's layers have just written."""
    slots: Tensor
    """[T] int64, 0 for none; tokens of one request are neighbours."""
    a: dict[int, list[Tensor]]
    """By slot, of each slice [rank, width]."""
    b: dict[int, list[Tensor]]
    """By slot, of each slice [its columns, rank]."""
    scale: float
    slices: tuple[int, ...]
    segments: Segments
