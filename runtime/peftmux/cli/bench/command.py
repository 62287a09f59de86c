"""The benchmark's command: rounds of all contenders in turn, medians, ratios, a table and JSON."""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers

from peftmux.cli.bench.kinds import KINDS, save_random_kinds
from peftmux.cli.bench.opponents import ENGINES
from peftmux.cli.bench.processes import Opponents, Served
from peftmux.cli.bench.workload import RANDOM_MODELS, Workload, save_random_loras, save_random_model

Cell = tuple[str, int]
"""(contender, concurrent requests)"""
_LORAS, _MIXED = "peftmux, {} LoRAs r=16 (beside kinds)", "peftmux, {} adapters of all kinds"
_KINDS_RANK = 16
_RANKS = {1: 8, 8: 8, 32: 16}
"""Rank of the LoRAs by how many there are; ENGINE's reference points."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peftmux bench",
        description="Tokens per second of `peftmux serve` through gRPC with 0, 1, 8 and 32 different LoRA adapters on "
        "all linear layers, beside transformers' continuous batching and padded generate, in one run.",
    )
    parser.add_argument("--size", choices=sorted(RANDOM_MODELS), default="100m", help="random Llama (default 100m)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--requests", type=_counts, default=(1, 8, 32), metavar="N,N", help="concurrent requests")
    parser.add_argument("--adapters", type=_counts, default=(0, 1, 8, 32), metavar="N,N", help="different adapters")
    parser.add_argument(
        "--kinds",
        type=int,
        default=0,
        metavar="N",
        help="also N adapters whose kinds take turns, beside N LoRAs of rank 16, over the same rows",
    )
    parser.add_argument("--rounds", type=int, default=3, help="times each contender runs; medians are shown")
    parser.add_argument("--num-threads", type=int, default=None)
    parser.add_argument("--no-opponents", action="store_true", help="leave transformers out")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write every figure here")
    return parser


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="peftmux-bench-") as folder:
        seconds = _measure(args, device, Path(folder))
    workloads = {n: Workload.draw(n, RANDOM_MODELS[args.size]["vocab_size"]) for n in args.requests}
    rates = {cell: [workloads[cell[1]].new_tokens / s for s in times] for cell, times in seconds.items()}
    report = _report(args, device, rates)
    print(_table(report))
    if args.kinds:
        print(_kinds_line(args, rates))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _measure(args: argparse.Namespace, device: str, folder: Path) -> dict[Cell, list[float]]:
    """Seconds of every contender in every round. One warm-up each, then all in turn, round after round."""
    model, root = folder / "model", folder / "adapters"
    _say(f"making a random {args.size} Llama and {sum(args.adapters)} LoRA adapters")
    save_random_model(args.size, args.dtype, model)
    groups = {n: [f"r{_rank(n)}-of{n}-{i}" for i in range(n)] for n in args.adapters if n}
    for n, names in groups.items():
        save_random_loras(model, root, _rank(n), names)
    root.mkdir(exist_ok=True)
    contenders = {_ours(n): groups.get(n, [""]) for n in args.adapters}
    if args.kinds:
        beside = [f"beside-kinds-{i}" for i in range(args.kinds)]
        save_random_loras(model, root, _KINDS_RANK, beside)
        contenders[_LORAS.format(args.kinds)] = beside
        contenders[_MIXED.format(args.kinds)] = save_random_kinds(model, root, args.kinds)
    flags = ["--device", device, "--dtype", args.dtype, "--no-prefix-caching"]
    if args.num_threads:
        flags += ["--num-threads", str(args.num_threads)]
    seconds: dict[Cell, list[float]] = {}
    with ExitStack() as stack:
        served = stack.enter_context(Served(model, root, flags))
        opponents = None
        if not args.no_opponents:
            opponents = stack.enter_context(Opponents(model, device, args.num_threads))
        asyncio.run(served.load([name for group in contenders.values() for name in group if name]))
        for turn in range(args.rounds + 1):
            for requests in args.requests:
                workload = Workload.draw(requests, RANDOM_MODELS[args.size]["vocab_size"])
                for contender, group in contenders.items():
                    _note(seconds, turn, (contender, requests), asyncio.run(served.run(workload, group)))
                for name in ENGINES if opponents else ():
                    assert opponents is not None
                    _note(seconds, turn, (f"transformers {name}", requests), opponents.run(name, workload))
            _say(f"round {turn} of {args.rounds}" + (" (warm-up, not counted)" if not turn else ""))
    return seconds


def _rank(adapters: int) -> int:
    return _RANKS.get(adapters, 8)


def _ours(adapters: int) -> str:
    if not adapters:
        return "peftmux, base model"
    return f"peftmux, {adapters} LoRA{'s' if adapters > 1 else ''} r={_rank(adapters)}"


def _note(seconds: dict[Cell, list[float]], turn: int, cell: Cell, took: float) -> None:
    if turn:
        seconds.setdefault(cell, []).append(took)


def _report(args: argparse.Namespace, device: str, rates: dict[Cell, list[float]]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for name, _ in rates))
    base = _ours(0)
    rows = []
    for name in names:
        for requests in args.requests:
            own = rates[name, requests]
            row: dict[str, Any] = {
                "contender": name,
                "requests": requests,
                "tokens_per_second": [round(r, 1) for r in own],
                "median": round(statistics.median(own), 1),
            }
            if (base, requests) in rates:
                pairs = zip(own, rates[base, requests], strict=True)
                row["of_our_base"] = round(statistics.median(a / b for a, b in pairs), 3)
            rows.append(row)
    return {
        "model": f"random Llama {args.size}",
        "dtype": args.dtype,
        "device": torch.cuda.get_device_name(0) if device == "cuda" else _processor(),
        "threads": args.num_threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rounds": args.rounds,
        "rows": rows,
    }


def _kinds_line(args: argparse.Namespace, rates: dict[Cell, list[float]]) -> str:
    """The cost of mixing kinds: the time of the mixed batch over that of the LoRAs in the same round."""
    requests = max(args.requests)
    mixed, loras = (rates[name.format(args.kinds), requests] for name in (_MIXED, _LORAS))
    ratio = statistics.median(b / a for a, b in zip(mixed, loras, strict=True))
    kinds = min(args.kinds, len(KINDS) + 1)
    return f"{kinds} kinds in one batch of {requests} rows take {ratio:.2f}x the time of as many LoRAs"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _table(report: dict[str, Any]) -> str:
    """Medians; in brackets the median over the rounds of the ratio to our own base-model rate in the same round."""
    requests = list(dict.fromkeys(row["requests"] for row in report["rows"]))
    head = f"{report['model']}, {report['dtype']}, {report['device']}, {report['threads']} threads: tokens/s"
    lines = [head, f"{'':34}" + "".join(f"{f'{n} requests':>20}" for n in requests)]
    for name in dict.fromkeys(row["contender"] for row in report["rows"]):
        cells = {row["requests"]: row for row in report["rows"] if row["contender"] == name}
        lines.append(f"{name:34}" + "".join(f"{_cell(cells[n]):>20}" for n in requests))
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    ratio = f" ({row['of_our_base']:.2f})" if "of_our_base" in row else ""
    return f"{row['median']:.0f}{ratio}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
