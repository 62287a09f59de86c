"""What the benchmarks of kernels and of the engine are asked alike, as `make gpu` does."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def option_parser(name: str, description: str, budget: float) -> argparse.ArgumentParser:
    """Of benchmarks.NAME, which writes NAME.json and NAME.md; budget: seconds, where none are asked for."""
    made = argparse.ArgumentParser(prog=f"benchmarks.{name}", description=description)
    made.add_argument("--out", type=Path, required=True, help=f"folder of {name}.json and {name}.md")
    made.add_argument("--budget", type=float, default=budget, help="seconds")
    made.add_argument("--dry", action="store_true", help="tiny shapes on the CPU: the flow, no figures")
    made.add_argument(
        "--opponent", action="append", default=[], metavar="NAME=PATH", help="low-rank kernels; may be repeated"
    )
    return made


def lacks_device(dry: bool) -> bool:
    """Says so where figures are wanted and there is no device to take them on."""
    if dry or torch.cuda.is_available():
        return False
    print("expected a CUDA device, got none (--dry runs the flow on the CPU)", file=sys.stderr)
    return True
