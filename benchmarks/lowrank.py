"""The gathered low-rank operator beside a torch loop and opponents given by file, over mixes, ranks, tokens and sites.

    python -m benchmarks.lowrank --out FOLDER [--budget SECONDS] [--dry] [--opponent NAME=PATH ...]

from the repository's root with its source roots on PYTHONPATH (`make gpu` does both). Writes lowrank.json and
lowrank.md. Timed is always the base's product with what the adapters add to it, in a replayed CUDA graph in which
several sets of weights and adapters take turns, never the kernel by itself; what a form adds is that time less the
base's own, and a step's metadata is timed apart, since all sites of a step share it. Floors follow from the rates of a
copy and of a large product, both measured here. An opponent's file offers `build(problem)`: see
`benchmarks.lowrank_cases.Problem`. Cases come in order of importance; those that the budget does not reach are named.
Both files are written anew after each case.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.engine_model import bandwidth, synchronize
from benchmarks.lowrank_cases import DRY, FULL, Case, Problem, Rates, Scale, cases, segments
from benchmarks.lowrank_forms import SCALE, Ours, Pool, Run, TorchLoop, exact, opponent
from benchmarks.options import lacks_device, option_parser

Result = dict[str, Any]
Build = Callable[[Problem, Pool], Run]
_HELD_POOLS = 3
_METADATA_RUNS = 50


class Bench:
    """Pools of weights and adapters, kept while the memory is not needed for others."""

    def __init__(self, scale: Scale, device: torch.device, dtype: torch.dtype, rates: Rates) -> None:
        self.scale, self.device, self.dtype, self.rates = scale, device, dtype, rates
        self._pools: dict[tuple[str, int], list[Pool]] = {}

    def pools(self, case: Case) -> list[Pool]:
        key = (case.site.name, case.rank)
        if key not in self._pools:
            while len(self._pools) >= _HELD_POOLS:
                self._pools.pop(next(iter(self._pools)))
            make = (Pool(case.site, case.rank, self.scale, self.device, self.dtype) for _ in range(self.scale.copies))
            self._pools[key] = list(make)
        return self._pools[key]

    def release(self) -> None:
        """Give the device's memory back."""
        self._pools.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def problems(self, case: Case, pools: Sequence[Pool]) -> list[Problem]:
        made = []
        for shift, pool in enumerate(pools):
            step = segments(case, shift, self.scale, self.device)
            x = torch.randn(case.tokens, case.site.width, dtype=self.dtype, device=self.device)
            y = torch.empty(case.tokens, sum(case.site.slices), dtype=self.dtype, device=self.device)
            owner = step.slot_of_token
            made.append(Problem(x, y, owner, pool.a, pool.b, SCALE, case.site.slices, step))
        return made

    def run(self, case: Case, forms: Mapping[str, Build]) -> Result:
        """One case by every form. One that fails is named, and leaves the others theirs."""
        pools = self.pools(case)
        problems = self.problems(case, pools)
        base = self._seconds(problems, pools, [_nothing] * len(pools))
        floor = self.rates.lowrank(case, problems[0].segments, self.dtype.itemsize)
        least = self.rates.base(case, self.dtype.itemsize)
        result: Result = {
            "form": pools[0].site.path,
            "base_us": 1e6 * base,
            "base_floor_us": 1e6 * least,
            "floor_us": 1e6 * floor,
            "forms": {},
        }
        for name, build in forms.items():
            try:
                runs = [build(problem, pool) for problem, pool in zip(problems, pools, strict=True)]
                seconds = self._seconds(problems, pools, runs)
                result["forms"][name] = {
                    "us": 1e6 * seconds,
                    "added_us": 1e6 * (seconds - base),
                    "times_floor": (seconds - base) / floor if floor else None,
                    "over_base": seconds / base - 1,
                    "metadata_us": 1e6 * self._metadata_seconds(runs[0]),
                    **self._quality(problems[0], pools[0], runs[0]),
                }
            except Exception as error:  # an opponent's file may raise anything
                traceback.print_exc()
                result["forms"][name] = {"failed": f"{type(error).__name__}: {error}"}
        return result

    def _seconds(self, problems: Sequence[Problem], pools: Sequence[Pool], runs: Sequence[Run]) -> float:
        """The median time of one site: the base's product, then the form."""

        def step() -> None:
            for problem, pool, run in zip(problems, pools, runs, strict=True):
                torch.mm(problem.x, pool.weight.t(), out=problem.y)
                run()

        replay = step
        if self.device.type == "cuda":
            replay = _captured(step)
        taken = []
        for _ in range(self.scale.replays):
            taken.append(_timed(replay, self.device))
        return statistics.median(taken) / len(pools)

    def _metadata_seconds(self, run: Run) -> float:
        """Of one step, on the host and the device together; 0 for a form that has none."""
        metadata = getattr(run, "metadata", None)
        if metadata is None:
            return 0.0
        count = _METADATA_RUNS if self.device.type == "cuda" else 2
        synchronize(self.device)
        started = time.perf_counter()
        for _ in range(count):
            metadata()
        synchronize(self.device)
        return (time.perf_counter() - started) / count

    def _quality(self, problem: Problem, pool: Pool, run: Run) -> Result:
        """The error against float64, relative to what is added, and whether a second run gives the same bits."""
        before = torch.mm(problem.x, pool.weight.t())

        def once() -> Tensor:
            problem.y.copy_(before)
            run()
            return problem.y.clone()

        first, second = once(), once()
        wanted = exact(problem, before)
        added = (wanted - before.double()).norm()
        error = (first.double() - wanted).norm() / added if added else (first - before).abs().max()
        return {"error": float(error), "repeatable": torch.equal(first, second)}


def _nothing() -> None:
    """The base alone."""


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay() -> None:
        graph.replay()

    for _ in range(3):
        replay()
    return replay


def _timed(replay: Callable[[], None], device: torch.device) -> float:
    if device.type == "cpu":
        started = time.perf_counter()
        replay()
        return time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def arithmetic(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Floating-point operations a second of a large square product: the best of some."""
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    best = min(_timed(lambda: torch.mm(a, b), device) for _ in range(10))  # type: ignore[arg-type]
    return 2 * width**3 / best


def table(machine: Result, results: Mapping[str, Result]) -> str:
    """Markdown: a row for each case that ran, a column for each form."""
    names = list(dict.fromkeys(name for result in results.values() for name in result["forms"]))
    head = ["base, us", "floor, us", *(f"{name}: added, us (x floor)" for name in names)]
    lines = [
        f"Low rank in {machine['dtype']} on {machine['device']}: {machine['bytes_per_second'] / 1e12:.2f} TB/s, "
        f"{machine['flops_per_second'] / 1e12:.0f} TFLOP/s; {machine['left_out']} cases left out by the budget",
        "",
        "| | " + " | ".join(head) + " |",
        "|---" * (len(head) + 1) + "|",
    ]
    for case, result in results.items():
        cells = [f"{result['base_us']:.1f}", f"{result['floor_us']:.2f}"]
        cells += [_cell(result["forms"].get(name)) for name in names]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    unusable = machine["unusable_opponents"]
    lines += ["", *(f"{name} cannot be used: {why}" for name, why in unusable.items())] if unusable else []
    return "\n".join(lines) + "\n"


def _cell(form: Result | None) -> str:
    if form is None:
        return ""
    if "failed" in form:
        return "failed"
    times = form["times_floor"]
    return f"{form['added_us']:.2f}" + (f" ({times:.2f})" if times is not None else "")


def opponents(named: Sequence[str]) -> tuple[dict[str, Build], dict[str, str]]:
    """-> (forms by name, why the others cannot be used, by name). What cannot be used is also said on stderr."""
    forms: dict[str, Build] = {}
    unusable: dict[str, str] = {}
    for each in named:
        try:
            name, build = opponent(each)
        except (Exception, SystemExit) as error:  # importing another project's file may raise anything
            unusable[each.partition("=")[0]] = f"{type(error).__name__}: {error}"
            print(f"--opponent {each}: {type(error).__name__}: {error}", file=sys.stderr)
        else:
            forms[name] = lambda problem, pool, build=build: build(problem)  # type: ignore[misc]
    return forms, unusable


def write(
    folder: Path, machine: Result, results: Mapping[str, Result], left_out: Sequence[str], no_room: Sequence[str]
) -> None:
    """lowrank.json and lowrank.md of what is measured so far; each is whole whenever this process is stopped."""
    machine = {**machine, "left_out": len(left_out)}
    written = {**machine, "results": results, "cut_by_the_budget": left_out, "no_room": no_room}
    for name, text in (
        ("lowrank.json", json.dumps(written, indent=2) + "\n"),
        ("lowrank.md", table(machine, results)),
    ):
        (folder / f"{name}.new").write_text(text, encoding="utf-8")
        (folder / f"{name}.new").replace(folder / name)


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    options = option_parser("lowrank", "The low-rank operator's added time.", budget=300).parse_args(arguments)
    if lacks_device(options.dry):
        return 3
    forms: dict[str, Build] = {
        "ours": lambda problem, pool: Ours(problem, pool.site),
        "torch loop": lambda problem, pool: TorchLoop(problem),
    }
    theirs, unusable = opponents(options.opponent)
    forms.update(theirs)
    device = torch.device("cpu" if options.dry else "cuda")
    dtype = torch.float32 if options.dry else torch.bfloat16
    scale = DRY if options.dry else FULL
    rates = Rates(bandwidth(device, scale.copied), arithmetic(device, dtype, scale.product))
    bench = Bench(scale, device, dtype, rates)
    options.out.mkdir(parents=True, exist_ok=True)
    machine: Result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu (dry)",
        "dtype": str(dtype).removeprefix("torch."),
        "bytes_per_second": rates.bytes_per_second,
        "flops_per_second": rates.flops_per_second,
        "copies": scale.copies,
        "unusable_opponents": unusable,
    }
    results: dict[str, Result] = {}
    no_room: list[str] = []
    wanted = cases(scale)
    write(options.out, machine, results, [case.name for case in wanted], no_room)
    for done, case in enumerate(wanted, 1):
        if time.monotonic() - started >= options.budget:
            break
        try:
            results[case.name] = bench.run(case, forms)
            print(f"{case.name}: {json.dumps(results[case.name])}", flush=True)
        except torch.OutOfMemoryError:
            bench.release()
            no_room.append(case.name)
        write(options.out, machine, results, [case.name for case in wanted[done:]], no_room)
    return 1 if any("failed" in result["forms"]["ours"] for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
