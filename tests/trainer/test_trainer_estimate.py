"""`--dry-run` says what a run takes: against the peak of real runs, as the system sees it and as tensors alive."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

from peftmux.trainer import OptionError, train
from peftmux.trainer.estimate.fit import Shape, StepMemory
from peftmux.trainer.estimate.live import LiveBytes
from tests.trainer.tiny_models import COMMON, HEADS, build_tokenizer, copy_task, save_base, write_rows

MEASURE = Path(__file__).with_name("measure_runs.py")
PEAKS: dict[str, tuple[int, dict[str, Any]]] = {
    "lora": (256, {"method": "lora"}),
    "prefix": (448, {"method": "prefix"}),
    "ladder": (448, {"method": "ladder"}),
    "lora, evaluated in large batches": (256, {"method": "lora", "training": {"per_device_eval_batch_size": 64}}),
}
"""The base's width, and a run."""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("case", PEAKS)
def test_the_peak_above_the_idle_process(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With the C library's heap as it is, holes and all.

    Where they come to lie differs between equal runs, so that one peak may be out of reach: then it is the range of
    three that the estimate has to be near to.
    """
    width, run = PEAKS[case]
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "vocab_size": 2000, "num_hidden_layers": 4}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**{**COMMON, **HEADS, **shape})).save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a" * 20, "completion": "b" * 60} for _ in range(64)])
    training: dict[str, Any] = {"max_steps": 5, "per_device_train_batch_size": 16, "disable_tqdm": True}
    if "training" in run:
        training |= {**run["training"], "eval_strategy": "steps", "eval_steps": 2}
        run = {**run, "eval_data": str(rows)}
    run = {**run, "model": str(tmp_path / "base"), "data": str(rows), "out": str(tmp_path / "a"), "training": training}
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    metrics = train(**run, dry_run=True).metrics
    peaks = [measured_peak({**run, "overwrite": True})]
    if metrics["peak_bytes"] != pytest.approx(peaks[0], rel=0.1):
        peaks += [measured_peak({**run, "overwrite": True}) for _ in range(2)]
    assert min(peaks) > 50e6
    assert 0.9 * min(peaks) <= metrics["peak_bytes"] <= 1.1 * max(peaks), peaks
    assert metrics["alive_bytes"] < 0.9 * min(peaks)


def measured_peak(run: dict[str, Any]) -> int:
    """Of a fresh process that trains, in bytes above what it held before."""
    done = subprocess.run([sys.executable, MEASURE], input=json.dumps(run), capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return int(done.stdout.split()[-1])


@pytest.fixture
def tensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the seconds of a process of its own."""
    monkeypatch.setattr("peftmux.trainer.estimate.estimate.fresh_peak", lambda *_: None)


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "prompt": ("prompt", {"config": {"num_virtual_tokens": 5}}),
    "shira": ("shira", {}),
    "one row a batch": ("lora", {"training": {"per_device_train_batch_size": 1}}),
    "accumulated": ("dora", {"training": {"gradient_accumulation_steps": 3}}),
    "checkpointed": ("prefix", {"training": {"gradient_checkpointing": True}}),
    "another optimiser": ("lora", {"training": {"optim": "adafactor"}}),
    "bfloat16": ("lora", {"training": {"bf16": True}}),
    "packed": ("lora", {"packing": True, "pack_length": 64}),
    "dpo": ("lora", {"loss": "dpo"}),
    "dpo, scored in large batches": ("lora", {"loss": "dpo", "training": {"per_device_eval_batch_size": 24}}),
    "evaluated": ("lora", {"training": {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 12}}),
}


class Peak(TrainerCallback):
    """Live bytes from the second step on: the optimiser has its state. Pairs are scored by the base before that."""

    def __init__(self) -> None:
        self.live = LiveBytes()
        self.bytes = self.scoring = 0

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.live.hold([*model.parameters(), *model.buffers()])
        self.live.begin()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.scoring = max(self.live.end(), default=0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.live.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        line = self.live.end()
        self.bytes = max(self.bytes, *line) if state.global_step > 1 else 0
        self.live.begin()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bytes = max(self.bytes, *self.live.end())


def optimizer_bytes(adapter: Any) -> int:
    """Adam's two moments, float32."""
    return sum(2 * parameter.nbytes for parameter in adapter.parameters.values())


@pytest.mark.parametrize("case", RUNS)
@pytest.mark.usefixtures("tensors_alone")
def test_every_way_to_run(case: str, qwen2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    method, run = RUNS[case]
    texts = [{"prompt": "a" * (20 + 3 * (i % 5)), "completion": "b" * (5 + i % 7)} for i in range(24)]
    if run.get("loss") == "dpo":
        texts = [{"prompt": t["prompt"], "chosen": t["completion"], "rejected": "c" * 9} for t in texts]
    training = {"max_steps": 12, "per_device_train_batch_size": 3, "disable_tqdm": True, **run.get("training", {})}
    options: dict[str, Any] = {
        "model": qwen2,
        "data": write_rows(tmp_path / "rows.jsonl", texts),
        "out": tmp_path / "a",
        **run,
        "training": training,
    }
    if case == "evaluated":
        options["eval_data"] = options["data"]
    estimated = train(method, **options, dry_run=True).metrics["alive_bytes"]
    shown = capsys.readouterr().err
    assert "roughly" not in shown
    assert "train_loss" not in shown, "of the steps that were tried"
    assert ("largest batch, one without gradients: " in shown) == ("eval_batch_size" in str(run))
    assert "time: 12 steps of about" in shown
    peak = Peak()
    with peak.live:
        result = train(method, **options, callbacks=[peak])
    if "scored" in case:  # which the estimate takes for an evaluation, with the adapter and its optimiser's state
        assert peak.scoring > 1.5 * peak.bytes
        assert peak.scoring < estimated < 1.1 * (peak.scoring + optimizer_bytes(result.adapter))
        return
    # accumulated: the largest batch may be a step's first, before there are gradients
    assert estimated == pytest.approx(peak.bytes, rel=0.05 if case == "accumulated" else 0.01)


@pytest.mark.usefixtures("tensors_alone")
def test_experts_are_estimated_roughly(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base, rows = save_base(tmp_path / "base", "mixtral"), write_rows(tmp_path / "rows.jsonl", copy_task(16))
    options: dict[str, Any] = {"model": base, "data": rows, "out": tmp_path / "a"}
    training = {"max_steps": 3, "disable_tqdm": True}
    estimated = train("lora", **options, training=training, dry_run=True).metrics["alive_bytes"]
    peak = Peak()
    with peak.live:
        train("lora", **options, training=training, callbacks=[peak])
    assert estimated == pytest.approx(peak.bytes, rel=0.1)


@pytest.mark.usefixtures("tensors_alone")
def test_a_dry_run_leaves_the_adapter_as_it_starts(qwen2: Path, rows: Path, tmp_path: Path):
    untouched = {"training": {"max_steps": 1, "learning_rate": 0.0, "disable_tqdm": True}}
    options: dict[str, Any] = {"model": qwen2, "data": rows, "out": tmp_path / "a"}
    dry = {"dry_run": True, "eval_data": rows, "training": {"eval_on_start": True}}
    adapters = [train("adalora", **options, **run).adapter for run in (dry, untouched)]
    parts = [adapter.state() for adapter in adapters]
    assert all(torch.equal(tensor, parts[0][name]) for name, tensor in parts[1].items() if "lora" in name)


def test_a_peak_may_move_with_the_size():
    """At small sizes the first operation holds most, at large ones the second."""
    shapes = [Shape(b, t, k) for b in (2, 4) for t in (8, 12, 20) for k in (3, 5)]
    lines = [[1000 + s.rows * s.tokens, s.rows * s.tokens**2 + 8 * s.rows * s.kept] for s in shapes]
    memory = StepMemory(shapes, lines)
    assert memory.exact
    assert memory.peak(Shape(2, 4, 3)) == pytest.approx(1008)
    assert memory.peak(Shape(8, 500, 100)) == pytest.approx(8 * 500**2 + 8 * 8 * 100, abs=2)
    assert memory.largest([Shape(1, 30, 2), Shape(3, 20, 2), Shape(2, 8, 8)]) == Shape(3, 20, 2)
    assert not StepMemory(shapes, [[1, 2], *lines[1:]]).exact


@pytest.mark.parametrize("other", [{"sweep": "r=2,4"}, {"ensemble": 2}])
def test_several_runs_at_once_are_not_estimated(other: dict[str, Any], qwen2: Path, rows: Path, tmp_path: Path):
    with pytest.raises(OptionError, match="dry-run"):
        train("lora", model=qwen2, data=rows, out=tmp_path / "a", dry_run=True, **other)
