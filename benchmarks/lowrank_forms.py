"""The forms that the low-rank benchmark compares: ours, a loop of torch's products, and opponents given by file."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lowrank_cases import Problem, Scale, Site
from peftmux.kernels.lowrank import LinearPart, LowRankSite
from peftmux.kernels.lowrank.tiles import TileBuffer

Run = Callable[[], object]
"""Changes its problem's y in place; may have an attribute `metadata` (see `Problem`)."""
SCALE = 0.5


class Pool:
    """One set of weights with as many adapters of one rank as a case may need, for every form."""

    def __init__(self, site: Site, rank: int, scale: Scale, device: torch.device, dtype: torch.dtype) -> None:
        def random(*shape: int) -> Tensor:
            values: Tensor = torch.randn(*shape, dtype=dtype, device=device) / shape[1] ** 0.5
            return values

        slots = range(1, scale.adapters + 1)
        self.weight = random(sum(site.slices), site.width)
        self.a = {slot: [random(rank, site.width) for _ in site.slices] for slot in slots}
        self.b = {slot: [random(n, rank) for n in site.slices] for slot in slots}
        self.site = LowRankSite(site.width, site.slices, dtype, device)
        for slot in slots:
            parts = [LinearPart(a, b, SCALE) for a, b in zip(self.a[slot], self.b[slot], strict=True)]
            self.site.put(slot, self.site.prepare(parts))


class Ours:
    """The site that serves, over a step's fixed buffers."""

    def __init__(self, problem: Problem, site: LowRankSite) -> None:
        self._problem, self._site = problem, site
        self._buffer: TileBuffer | None = None
        self._segments = problem.segments
        if problem.x.is_cuda:
            step = problem.segments
            self._buffer = TileBuffer(step.num_tokens, len(step.slots), problem.x.device, step.runs)
            self._segments = type(step).over(self._buffer, problem.x.device)

    def __call__(self) -> None:
        self._site.apply(self._problem.y, self._problem.x, self._segments)

    def metadata(self) -> None:
        if self._buffer is not None:
            self._buffer.fill(self._problem.segments.runs)


class TorchLoop:
    """One adapter after the other, each slice by itself."""

    def __init__(self, problem: Problem) -> None:
        self._steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for slot, start, end in problem.segments.runs:
            x = problem.x[start:end]
            targets = problem.y[start:end].split(problem.slices, 1)
            self._steps += [
                (target, x, a.t(), b.t())
                for target, a, b in zip(targets, problem.a[slot], problem.b[slot], strict=True)
            ]
        self._scale = problem.scale

    def __call__(self) -> None:
        for target, x, a, b in self._steps:
            target.addmm_(x @ a, b, alpha=self._scale)


def exact(problem: Problem, before: Tensor) -> Tensor:
    """What y becomes, in float64."""
    out = before.double()
    for slot, start, end in problem.segments.runs:
        x = problem.x[start:end].double()
        for target, a, b in zip(out[start:end].split(problem.slices, 1), problem.a[slot], problem.b[slot], strict=True):
            target += problem.scale * (x @ a.double().t()) @ b.double().t()
    return out


def opponent(named: str) -> tuple[str, Callable[[Problem], Run]]:
    """NAME=PATH of a Python file that offers `build(problem) -> callable` -> (name, build). ValueError otherwise."""
    name, separator, path = named.partition("=")
    if not (name and separator and path):
        raise ValueError(f"--opponent: expected NAME=PATH, got {named!r}")
    file = Path(path).resolve()
    if not file.is_file():
        raise ValueError(f"--opponent {name}: expected a Python file, got {path!r}")
    spec = importlib.util.spec_from_file_location(f"opponent_{name}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--opponent {name}: expected a Python file, got {path!r}")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "build", None)):
        raise ValueError(f"--opponent {name}: expected a function `build` in {path!r}")
    build: Callable[[Problem], Run] = module.build
    return name, build
