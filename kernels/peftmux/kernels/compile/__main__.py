"""python -m peftmux.kernels.compile [--arch 80 90 100] [--only NAME] [--json FILE]: compile all, print, gate.

Exit status: 0 every variant compiles and passes; 1 one does not; 2 this interpreter cannot compile.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pkgutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peftmux.kernels
from peftmux.kernels.compile.variant import Variant

ARCHITECTURES = (80, 90, 100)


def all_variants() -> Iterator[tuple[str, Variant]]:
    """(operator, variant) of every operator that has `triton_variants`."""
    for package in pkgutil.iter_modules(peftmux.kernels.__path__):
        name = f"{peftmux.kernels.__name__}.{package.name}.triton_variants"
        if package.ispkg and importlib.util.find_spec(name):
            for variant in importlib.import_module(name).variants():
                yield package.name, variant


def main(argv: list[str] | None = None) -> int:
    options = _arguments(argv)
    if os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("triton") is None:
        print("expected triton, and TRITON_INTERPRET unset", file=sys.stderr)
        return 2
    work = [
        (operator, index, arch)
        for arch in options.arch
        for index, (operator, variant) in enumerate(all_variants())
        if options.only in f"{operator}/{variant.name}"
    ]
    with ProcessPoolExecutor(options.workers) as pool:
        lines = list(pool.map(_one, work, chunksize=1))
    for line in lines:
        print(_printed(line), flush=True)
    bad = [line for line in lines if line["violations"]]
    print(f"{len(lines)} compiled, {len(bad)} fail")
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1) + "\n")
    return 1 if bad or not lines else 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m peftmux.kernels.compile", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="compute capabilities, as 90")
    parser.add_argument("--only", default="", help="variants whose operator/name contains this")
    parser.add_argument("--json", type=Path, help="write what was measured here")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    return parser.parse_args(argv)


def _one(job: tuple[str, int, int]) -> dict[str, Any]:
    """In a worker: kernels do not travel between processes, so the variant is found again by its index."""
    from peftmux.kernels.compile.gates import violations
    from peftmux.kernels.compile.measure import measure

    operator, index, arch = job
    variant = list(all_variants())[index][1]
    line: dict[str, Any] = {"operator": operator, "variant": variant.name, "arch": arch}
    try:
        measured = measure(variant, arch)
    except Exception as error:  # whatever the compiler raises is this variant's result
        return {**line, "violations": [f"does not compile: {type(error).__name__}: {error}"]}
    return {**line, **asdict(measured), "violations": violations(variant, measured)}


def _printed(line: dict[str, Any]) -> str:
    head = f"sm_{line['arch']:<4} {line['operator']}/{line['variant']}"
    counts = f"{line['registers']:4} registers {line['shared']:7} B shared" if "registers" in line else ""
    return f"{head:60} {counts} {'; '.join(line['violations']) or 'ok'}"


if __name__ == "__main__":
    sys.exit(main())
