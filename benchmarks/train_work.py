"""One measurement of benchmarks/train.py, in a process of its own. What each kind takes and gives is with it."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers.utils import logging

from benchmarks.train_inputs import SIZES, make_inputs
from benchmarks.train_jobs import compare_jobs
from benchmarks.train_runs import LIBRARIES, Clock, Run
from peftmux.trainer.estimate.resident import resident


def work(spec: dict[str, Any]) -> dict[str, Any]:
    """spec: {"kind": "inputs" | "speed" | "memory" | "jobs", "folder", "size", "rounds", ...}. The rest is silent."""
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        return WORK[spec["kind"]](spec)


def inputs(spec: dict[str, Any]) -> dict[str, Any]:
    """Write the base and the rows; what was written, and where."""
    make_inputs(Path(spec["folder"]), SIZES[spec["size"]], spec["dtype"])
    make_inputs(Path(spec["folder"]) / "tiny", SIZES["tiny"], spec["dtype"])
    return {"machine": machine(), "sizes": SIZES[spec["size"]].as_dict()}


def speed(spec: dict[str, Any]) -> dict[str, Any]:
    """Of each round the tokens a second of each library, which take turns. The first turn of each is not counted."""
    run = run_of(spec)
    rounds = []
    for number in range(spec["rounds"] + 1):
        order = list(LIBRARIES) if number % 2 else list(LIBRARIES)[::-1]
        rates = {}
        for library in order:
            clock = Clock()
            LIBRARIES[library](run if number else run.short(), clock)
            rates[library] = clock.rate()
            gc.collect()
        rounds.append(rates)
    return {"rounds": rounds[1:]}


def memory(spec: dict[str, Any]) -> dict[str, Any]:
    """The peak over the process as it is after a tiny run, which brings in what is loaded when it is first needed."""
    library = LIBRARIES[spec["library"]]
    library(run_of({**spec, "folder": f"{spec['folder']}/tiny", "size": "tiny"}).short(), Clock())
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        library(run_of(spec).short(), Clock())
        return {"peak_bytes": torch.cuda.max_memory_allocated()}
    idle = resident() or 0
    Path("/proc/self/clear_refs").write_text("5")
    library(run_of(spec).short(), Clock())
    return {"peak_bytes": (resident("VmHWM") or 0) - idle}


def jobs(spec: dict[str, Any]) -> dict[str, Any]:
    size = SIZES[spec["size"]]
    return compare_jobs(Path(spec["folder"]), size, spec["rows"], spec["tokens"], spec["rounds"])


WORK = {"inputs": inputs, "speed": speed, "memory": memory, "jobs": jobs}


def run_of(spec: dict[str, Any]) -> Run:
    return Run(Path(spec["folder"]), SIZES[spec["size"]], spec["method"], bool(spec.get("packing")))


def machine() -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def processor() -> str:
    """ "Intel(R) Xeon(R) Processor" with AMX and two cores: "cpu xeon amx 2 cores"."""
    info = Path("/proc/cpuinfo").read_text()
    found = re.search(r"^model name\s*:\s*(.*)$", info, re.MULTILINE)
    name = re.sub(r"\((R|TM)\)|\b(Intel|AMD|Processor|CPU)\b|@.*", " ", found.group(1) if found else platform.machine())
    amx = "amx" if "amx_tile" in info else ""
    return " ".join(["cpu", *name.split(), *amx.split(), f"{os.cpu_count()} cores"])
