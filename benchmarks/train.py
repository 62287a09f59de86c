"""Training beside PEFT with transformers' Trainer: the same model, rows, batches, trained layers and dtype, in one run.

    python benchmarks/train.py            # a 100M-parameter random Llama; under ten minutes on two cores
    python benchmarks/train.py --dry      # tiny sizes, one round: shows that everything runs

Needs `peft` beside peftmux. The opponents take turns within one process, `--rounds` times in changing order: tokens a
second over the steps after the first, and the median of the rounds' ratios. The peak of memory over the idle process is
measured in processes of its own. Then packing on rows of mixed length against PEFT's padding, and LoRA jobs in one
batch against the same jobs one after another, the training alone. Writes OUT/DEVICE/train.json and train.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
ROOTS = ("runtime", "kernels", "trainer", "protos", ".")
METHODS = ("lora", "dora", "prefix", "ia3")
PARTS = ("methods", "packing", "jobs")
Work = Callable[..., dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Training speed and memory beside PEFT's.")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results", help="folder of DEVICE/*")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="the base's")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, one round")
    args = parser.parse_args(argv)
    started = time.monotonic()
    size, rounds = ("tiny", 1) if args.dry else ("full", args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        work: Work = partial(Processes().work, folder=folder, size=size, rounds=rounds)
        results: dict[str, Any] = {**work(kind="inputs", dtype=args.dtype), "dtype": args.dtype}
        if "methods" in args.parts:
            results["methods"] = {method: compare(work, method) for method in args.methods}
        if "packing" in args.parts:
            results["packing"] = compare(work, "lora", packing=True)
        if "jobs" in args.parts:
            results["jobs"] = [work(kind="jobs", rows=r, tokens=t) for r, t in results["sizes"]["jobs"]]
    results["seconds"] = round(time.monotonic() - started)
    write(args.out / slug(results["machine"]["device"]), results)
    return 0


def compare(work: Work, method: str, packing: bool = False) -> dict[str, Any]:
    """Medians of ours and of PEFT's, the median of the rounds' speed ratios, and the ratio of the peaks."""
    rounds = work(kind="speed", method=method, packing=packing)["rounds"]
    peaks = {
        library: work(kind="memory", method=method, packing=packing, library=library) for library in ("peftmux", "peft")
    }
    return {
        **{
            library: {"tokens_per_second": statistics.median(r[library] for r in rounds), **peak}
            for library, peak in peaks.items()
        },
        "speed_ratios": [r["peftmux"] / r["peft"] for r in rounds],
        "speed_ratio": statistics.median(r["peftmux"] / r["peft"] for r in rounds),
        "memory_ratio": peaks["peftmux"]["peak_bytes"] / peaks["peft"]["peak_bytes"],
    }


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Called in a process that has imported everything and computed nothing."""
    from benchmarks.train_work import work

    return work(spec)


class Processes:
    """A fresh process for each measurement, forked from one that has done the imports."""

    def __init__(self) -> None:
        roots = [str(REPOSITORY / root) for root in ROOTS]
        sys.path[:0] = roots
        os.environ |= {"PYTHONPATH": os.pathsep.join(roots), "TOKENIZERS_PARALLELISM": "false"}
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["benchmarks.train_work"])

    def work(self, **spec: Any) -> dict[str, Any]:
        with ProcessPoolExecutor(1, mp_context=self._context) as pool:
            result = pool.submit(measure, spec).result()
        words = [str(spec[name]) for name in ("kind", "method", "library") if name in spec]
        print(" ".join([*words, json.dumps(result)[:300]]), file=sys.stderr, flush=True)
        return result


def write(folder: Path, results: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "train.md").write_text(table(results) + "\n")
    print(table(results))
    print(f"{results['seconds']} s; {folder / 'train.json'}", file=sys.stderr)


def table(results: dict[str, Any]) -> str:
    lines = ["| | peftmux, tokens/s | PEFT, tokens/s | ratio | peak memory, ratio |", "|---|---|---|---|---|"]
    rows = dict(results.get("methods", {}))
    if "packing" in results:
        rows["lora, packed, mixed lengths"] = results["packing"]
    for name, r in rows.items():
        speeds = " | ".join(f"{r[library]['tokens_per_second']:,.0f}" for library in ("peftmux", "peft"))
        lines.append(f"| {name} | {speeds} | {r['speed_ratio']:.2f} | {r['memory_ratio']:.2f} |")
    lines += [
        "",
        "| LoRA jobs | tokens of each in a step | at once, times the rate of one after another |",
        "|---|---|---|",
    ]
    lines += [
        f"| {r['jobs']} | {r['rows']} x {r['tokens']} | {r['speed_ratio']:.2f} |" for r in results.get("jobs", [])
    ]
    return "\n".join(lines)


def slug(name: str) -> str:
    """ "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
