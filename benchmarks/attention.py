"""Paged attention against its floor: decode and prefill, one layer's call out of a CUDA graph of several.

    python -m benchmarks.attention --out FOLDER [--budget SECONDS] [--dry]

from the repository's root with its source roots on PYTHONPATH (`make gpu` does both). Writes attention.json and
attention.md. The floor is what takes longer: reading the keys and values that the rows see at the rate of a copy here,
or the products of queries and keys they see at the rate of a large matrix product here. Layers have caches of their
own, so that none is found in the device's cache. Scenarios come in order of importance, and those that the budget does
not reach are left out and named. Opponents are what is installed of FlashInfer, flash-attn and torch's own attention.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_opponents import OPPONENTS, Layer, Unable
from benchmarks.engine_model import bandwidth, synchronize
from benchmarks.options import DTYPES, lacks_device, option_parser
from peftmux.kernels.attention import AttentionRows, StaticRows, choose_attention

_BLOCK = 16
_CACHES = 1 << 28
"""Bytes of keys and values that one replay reads at least: several times what a device caches."""
_FEWEST, _MOST = 2, 64
"""Layers of a replay."""

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Heads:
    """One layer's shape and options."""

    query: int
    key: int
    width: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    heads: Heads
    rows: tuple[tuple[int, int], ...]
    """(queries, context) of each."""

    @property
    def decodes(self) -> bool:
        return all(queries == 1 for queries, _ in self.rows)

    def seen(self) -> int:
        """Keys that the rows' queries see, counted once a row."""
        window = self.heads.window
        return sum(min(n, window + q - 1) if window else n for q, n in self.rows)

    def pairs(self) -> int:
        """Pairs of a query and a key it sees."""
        window = self.heads.window
        return sum(
            sum(min(at + 1, window) if window else at + 1 for at in range(n - q, n)) if q > 1 else min(n, window or n)
            for q, n in self.rows
        )

    def floor(self, itemsize: int, bytes_per_second: float, flops_per_second: float) -> float:
        """Seconds."""
        heads, tokens = self.heads, sum(q for q, _ in self.rows)
        moved = itemsize * heads.width * 2 * (self.seen() * heads.key + tokens * heads.query)
        return max(moved / bytes_per_second, 4 * self.pairs() * heads.query * heads.width / flops_per_second)


LLAMA = Heads(32, 8, 128)


def scenarios(dry: bool) -> list[Scenario]:
    """The most important first."""
    if dry:
        tiny = Heads(4, 2, 32)
        return [
            Scenario("decode 2 x 40", tiny, ((1, 40),) * 2),
            Scenario("decode 2 x 40, window", Heads(4, 2, 32, window=16, softcap=3.0, sinks=True), ((1, 40),) * 2),
            Scenario("prefill 20", tiny, ((20, 20),)),
            Scenario("mixed", tiny, ((1, 30), (1, 5), (7, 20))),
        ]
    uneven = tuple((1, max(16, 16384 // (i + 1))) for i in range(64))
    return [
        Scenario("decode 64 x 1024", LLAMA, ((1, 1024),) * 64),
        Scenario("decode 1 x 8192", LLAMA, ((1, 8192),)),
        Scenario("prefill 2048", LLAMA, ((2048, 2048),)),
        Scenario("decode 128 x 512", LLAMA, ((1, 512),) * 128),
        Scenario("decode 64 of 256 .. 16384", LLAMA, uneven),
        Scenario("prefill 512 on 8192", LLAMA, ((512, 8704),)),
        Scenario("prefill 100 on 8192", LLAMA, ((100, 8292),)),
        Scenario("60 x 1024 and prefill 512", LLAMA, ((1, 1024),) * 60 + ((512, 512),)),
        Scenario("prefill 8 x 256", LLAMA, ((256, 256),) * 8),
        Scenario("prefill 8192", LLAMA, ((8192, 8192),)),
        Scenario("decode 8 x 32768", LLAMA, ((1, 32768),) * 8),
        Scenario("decode 64 x 8192, window 1024", Heads(32, 8, 128, window=1024), ((1, 8192),) * 64),
        Scenario("decode 64 x 1024, sinks", Heads(64, 8, 64, window=128, sinks=True), ((1, 1024),) * 64),
        Scenario("decode 64 x 1024, softcap", Heads(8, 4, 256, softcap=50.0), ((1, 1024),) * 64),
        Scenario("decode 1 x 512", LLAMA, ((1, 512),)),
    ]


class Bench:
    """One scenario's tensors: layers with caches of their own, in which every row's blocks lie apart."""

    def __init__(self, scenario: Scenario, device: torch.device, dtype: torch.dtype) -> None:
        self.scenario, self.device = scenario, device
        heads = scenario.heads
        needed = [-(-n // _BLOCK) for _, n in scenario.rows]
        free = torch.randperm(sum(needed)).tolist()
        tables = [[free.pop() for _ in range(count)] for count in needed]
        size = len(tables) and sum(needed) * _BLOCK * heads.key * heads.width * 2 * dtype.itemsize
        layers = max(_FEWEST, min(_MOST, -(-_CACHES // size))) if device.type == "cuda" else _FEWEST
        shape = (sum(needed), _BLOCK, heads.key, heads.width)
        self.layers = [
            Layer(
                torch.randn(sum(q for q, _ in scenario.rows), heads.query, heads.width, device=device).to(dtype),
                torch.randn(shape, device=device, dtype=dtype),
                torch.randn(shape, device=device, dtype=dtype),
            )
            for _ in range(layers)
        ]
        self.rows = AttentionRows.build([q for q, _ in scenario.rows], [n for _, n in scenario.rows], tables, device)
        self._path = choose_attention(device, dtype)
        self._sinks = torch.randn(heads.query, device=device) if heads.sinks else None

    def own(self) -> tuple[Callable[[Layer], Tensor], float | None]:
        """Our attention of a layer, and the milliseconds that the host takes to fill in a decode step's rows."""
        rows, host = self.rows, None
        if self.scenario.decodes and self.device.type == "cuda":
            # As served: buffers for contexts twice as long.
            most = 2 * max(len(table) for table in rows.block_tables)
            static = StaticRows.decode(len(self.scenario.rows), most, _BLOCK, self.device)
            static.fill(rows)
            started = time.perf_counter()
            for _ in range(10):
                static.fill(rows)
            host = 1e2 * (time.perf_counter() - started)
            rows = static
        heads = self.scenario.heads
        options = {"window": heads.window, "softcap": heads.softcap, "sinks": self._sinks}

        def attend(layer: Layer) -> Tensor:
            return self._path.attend(
                layer.q,
                layer.k_cache,
                layer.v_cache,
                rows,
                scale=heads.width**-0.5,
                **options,  # type: ignore[arg-type]
            )

        return attend, host

    def seconds(self, attend: Callable[[Layer], Tensor], repeats: int) -> float:
        """Of one layer: the median replay, divided by its layers."""
        run = self._captured(attend)
        taken = []
        for _ in range(repeats):
            taken.append(_timed(run, self.device))
        return statistics.median(taken) / len(self.layers)

    def _captured(self, attend: Callable[[Layer], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for layer in self.layers:
                attend(layer)

        if self.device.type != "cuda":
            return run
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        return graph.replay


def _timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    synchronize(device)
    return float(before.elapsed_time(after)) * 1e-3


def flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of a large matrix product: the best of some."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = min(_timed(partial(torch.mm, a, b), device) for _ in range(10))
    return 2 * size**3 / best


def measure(scenario: Scenario, device: torch.device, dtype: torch.dtype, floor: float, repeats: int) -> Result:
    """Microseconds of one layer, ours and each opponent's that can do the same."""
    bench = Bench(scenario, device, dtype)
    attend, host = bench.own()
    us = 1e6 * bench.seconds(attend, repeats)
    result: Result = {"us": us, "floor_us": 1e6 * floor, "times_floor": us / (1e6 * floor)}
    if host is not None:
        result["host_ms"] = host
    expected = attend(bench.layers[0]).float()
    for name, opponent in OPPONENTS.items():
        try:
            theirs = opponent(bench.rows, scenario.heads, bench.layers)
            far = (theirs(bench.layers[0]).reshape(expected.shape).float() - expected).abs().max().item()
            result[name] = {"us": 1e6 * bench.seconds(theirs, repeats), "differs_by": far}
        except Unable as why:
            result[name] = {"note": str(why)}
        except Exception as error:  # another project's release may differ from what it was written for
            result[name] = {"note": f"{type(error).__name__}: {error}"[:200]}
    return result


def table(machine: Result, results: dict[str, Result]) -> str:
    """Markdown."""
    head = ["us a layer", "floor, us", "x floor", "host, ms", *(f"{name}, us" for name in OPPONENTS)]
    lines = [
        f"Attention: {machine['dtype']} on {machine['device']}, {machine['bytes_per_second'] / 1e12:.2f} TB/s, "
        f"{machine['flops_per_second'] / 1e12:.0f} TFLOP/s",
        "",
        "| | " + " | ".join(head) + " |",
        "|---" * (len(head) + 1) + "|",
    ]
    for name, result in results.items():
        cells = [f"{result[key]:.2f}" if key in result else "" for key in ("us", "floor_us", "times_floor", "host_ms")]
        if "note" in result:
            cells[0] = result["note"]
        cells += [f"{result[o]['us']:.2f}" if "us" in result.get(o, {}) else "" for o in OPPONENTS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    parser = option_parser("attention", "Paged attention against its floor.", budget=60)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    options = parser.parse_args(arguments)
    if lacks_device(options.dry):
        return 3
    device = torch.device("cpu" if options.dry else "cuda")
    dtype = DTYPES[options.dtype]
    rate, products = (
        bandwidth(device, 1 << 16 if options.dry else 1 << 30),
        flops(device, dtype, 64 if options.dry else 8192),
    )
    machine: Result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu (dry)",
        "dtype": options.dtype,
        "bytes_per_second": rate,
        "flops_per_second": products,
    }
    results: dict[str, Result] = {}
    options.out.mkdir(parents=True, exist_ok=True)
    for scenario in scenarios(options.dry):
        if time.monotonic() - started < options.budget:
            results[scenario.name] = attempt(scenario, device, dtype, rate, products, 2 if options.dry else 20)
        else:
            results[scenario.name] = {"note": "cut by the budget"}
        print(f"{scenario.name}: {json.dumps(results[scenario.name])}", flush=True)
        # Written each time: whoever stops this keeps what there is.
        heads = {s.name: asdict(s.heads) for s in scenarios(options.dry)}
        written = {**machine, "heads": heads, "results": results}
        (options.out / "attention.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        (options.out / "attention.md").write_text(table(machine, results), encoding="utf-8")
    return 1 if any("failed" in result for result in results.values()) else 0


def attempt(
    scenario: Scenario, device: torch.device, dtype: torch.dtype, rate: float, products: float, repeats: int
) -> Result:
    """A scenario that fails leaves the others theirs."""
    try:
        return measure(scenario, device, dtype, scenario.floor(dtype.itemsize, rate, products), repeats)
    except Exception as error:
        traceback.print_exc()
        return {"note": f"failed: {type(error).__name__}: {error}", "failed": True}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
