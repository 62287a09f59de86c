"""One run of the comparison, as a process of its own: train by the public trainer, serve by `Engine`, score.

What is measured is the run itself: `cpu_seconds` of the process from the first step to the last, `peak_bytes` of its
memory above what it held before, with Python, torch and transformers loaded and a first short run done (on a GPU: of
the device's memory).
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.methods_cases import BESIDE, TRAINING, Case, cases, held_out, task_number, told, write_rows
from benchmarks.methods_change import change_of
from peftmux.demo.score import exact
from peftmux.runtime import Engine
from peftmux.runtime.params import SamplingParams, StoppingParams
from peftmux.trainer import train
from peftmux.trainer.estimate.resident import resident
from peftmux.trainer.run.loop import TrainResult

ANSWER_TOKENS = 16
Record = dict[str, Any]


class Clock(TrainerCallback):
    """CPU seconds of the process, and seconds, between a run's first step and its end."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.process_time(), time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.cpu_seconds = time.process_time() - self._started[0]
        self.seconds = time.perf_counter() - self._started[1]


def run(base: Path, case: Case, task: str, steps: int, work: Path) -> Record:
    if not case.method:
        return {"accuracy": score(base, case, task, None)}
    result, record = trained(base, case, task, steps, work)
    record |= change_of(base, result.out)
    del result
    return record | {"accuracy": score(base, case, task, work / "adapter")}


def trained(base: Path, case: Case, task: str, steps: int, work: Path) -> tuple[TrainResult, Record]:
    options = {"model": base, "dtype": "float32", "task": case.kind, **case.options}
    config = dict(case.config)
    if case.fuses:
        config["adapters"] = [_member(base, case, name, steps, work) for name in (task, BESIDE)]
    data = write_rows(case, task, steps, work)
    short = {**TRAINING, "max_steps": 2}
    train(case.method, **options, data=data, out=work / "short", config=config, training=short)
    clock, before = Clock(), _start_of_peak()
    result = train(
        case.method,
        **options,
        data=data,
        out=work / "adapter",
        config=config,
        training={**TRAINING, "max_steps": steps},
        callbacks=[clock],
    )
    peak = _peak() - before
    return result, {
        "cpu_seconds": round(clock.cpu_seconds, 2),
        "seconds": round(clock.seconds, 2),
        "peak_bytes": peak,
        "trained": sum(result.adapter.sites().values()),
        "loss": result.metrics["train_loss"],
        "steps": result.steps,
    }


def _member(base: Path, case: Case, task: str, steps: int, work: Path) -> str:
    """A first stage's adapter."""
    out = work / task
    data = write_rows(case, task, steps, work)
    train(case.fuses, model=base, dtype="float32", data=data, out=out, training={**TRAINING, "max_steps": steps})
    return str(out)


def _start_of_peak() -> int:
    """Bytes now; `_peak` counts from here."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resident() or 0


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM") or 0


def score(base: Path, case: Case, task: str, adapter: Path | None) -> float:
    """The share of held-out inputs that the engine answers exactly, greedily, all in one batch."""
    rows = held_out(task)
    quantised = case.options.get("quantization")
    settings: dict[str, Any] = {"adapters": (("a", str(adapter)),)} if adapter else {}
    settings |= {"dtype": "float32", "quantization": quantised, "kv_cache_memory": 64 << 20}
    with Engine(str(base), **settings) as engine:
        name = "a" if adapter else ""
        if case.kind == "sequence":
            said = [answer.labels[0] for answer in engine.classify([row.prompt for row in rows], adapter=name)]
        else:
            texts = [told(task, row.prompt) if case.name == "base, told" else row.prompt for row in rows]
            prompts = [engine.encode_chat([("user", text)]) for text in texts]
            sampling, stopping = SamplingParams(temperature=0.0), StoppingParams(max_tokens=ANSWER_TOKENS)
            given: dict[str, Any] = {"adapter": name, "sampling": sampling, "stopping": stopping}
            said = [answer.text for answer in engine.generate(prompts, task=task_number(case, task), **given)]
    return exact(said, rows)


def write_record(base: Path, name: str, task: str, steps: int, out: Path) -> None:
    """The process's target: the record as JSON in `out`; where the run fails, one with "failed" and why.

    What the trainer says goes nowhere.
    """
    case = next(case for case in cases() if case.name == name)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            with tempfile.TemporaryDirectory() as work:
                record = run(base, case, task, steps, Path(work))
        except Exception as error:
            record = {"failed": f"{type(error).__name__}: {error}"}
    out.write_text(json.dumps(record), encoding="utf-8")
