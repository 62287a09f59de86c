"""Whole runs: what is learned, what can be repeated, what is left on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from peftmux.trainer import OptionError, TrainerError, train
from peftmux.trainer.data import file_digest
from tests.trainer.method_runs import (
    QUICK,
    assert_equal,
    check_files_give_the_models_logits,
    check_learns,
    check_resumes,
    check_seeds,
    tensors,
)
from tests.trainer.tiny_models import build_model, copy_task, save_base, write_rows

KINDS = {"lora-plus": "lora", "pissa": "lora"}
"""What these methods write is of another's kind."""


FIRST = (
    *("lora", "rslora", "lora-plus", "pissa", "dora", "adalora"),
    *("prefix", "prompt", "p-tuning", "ia3", "ln", "shira"),
)
"""The others' runs are in files of their own."""


@pytest.mark.parametrize("method", FIRST)
def test_a_run_learns_its_task_with_the_defaults(method: str, taught: Path, rows: Path, tmp_path: Path):
    """A prefix may start from being told."""
    told = {"num_virtual_tokens": 9, "prefix_init_text": "up ab=AB "} if method == "prefix" else {}
    check_learns(method, taught, rows, tmp_path, told)


@pytest.mark.parametrize("method", FIRST)
def test_what_is_written_gives_the_trained_models_logits(method: str, qwen2: Path, rows: Path, tmp_path: Path):
    kind = KINDS.get(method, method)
    check_files_give_the_models_logits(method, kind, qwen2, build_model("qwen2"), rows, tmp_path)


@pytest.mark.parametrize("method", FIRST)
def test_the_same_seed_gives_the_same_bits(method: str, qwen2: Path, rows: Path, tmp_path: Path):
    check_seeds(method, qwen2, rows, tmp_path)


@pytest.mark.parametrize("method", FIRST)
def test_a_resumed_run_ends_with_the_same_bits(method: str, qwen2: Path, rows: Path, tmp_path: Path):
    check_resumes(method, qwen2, rows, tmp_path)


def test_resuming_something_else_is_refused(qwen2: Path, rows: Path, tmp_path: Path):
    saving = {**QUICK, "save_strategy": "steps", "save_steps": 4}
    run: dict[str, Any] = {"model": qwen2, "data": rows, "out": tmp_path / "a", "training": saving}
    with pytest.raises(OptionError, match=r"resume: found no complete checkpoint in .*a\.checkpoints"):
        train("lora", **{**run, "training": QUICK}, resume=True)
    train("lora", **run)
    with pytest.raises(OptionError, match=r"written with options .*'r': 8.*, got .*'r': 4"):
        train("lora", **run, config={"r": 4}, resume=True, overwrite=True)
    newest = tmp_path / "a.checkpoints" / "checkpoint-6" / "trainer_state.json"
    newest.write_text(newest.read_text()[:50])  # cut off while it was written: the one before is taken
    assert train("lora", **run, resume=True, overwrite=True).steps == 6


def test_early_stopping_keeps_the_best(qwen2: Path, rows: Path, tmp_path: Path):
    held_out = write_rows(tmp_path / "eval.jsonl", copy_task(16, seed=1))
    losses: list[float] = []

    class Record(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            losses.append(metrics["eval_loss"])

    training = {**QUICK, "max_steps": 60, "learning_rate": 0.3, "eval_strategy": "steps", "eval_steps": 2}
    result = train(
        "lora",
        model=qwen2,
        data=rows,
        eval_data=held_out,
        out=tmp_path / "a",
        training=training,
        early_stopping_patience=2,
        callbacks=[Record()],
    )
    assert result.steps < 60, "at this rate the loss must rise soon"
    assert result.metrics["eval_loss"] == pytest.approx(min(losses))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "eval.jsonl"]


@pytest.mark.parametrize("best_at", [None, 1])
def test_adalora_ends_with_exactly_its_budget(best_at: int | None, qwen2: Path, rows: Path, tmp_path: Path):
    """Also where the best checkpoint is from before the budget has fallen; PEFT's own schedule is never called."""
    training: dict[str, Any] = {**QUICK, "max_steps": 12, "learning_rate": 1.0 if best_at else 1e-3}
    best: dict[str, Any] = {}
    if best_at:
        training |= {"eval_strategy": "steps", "eval_steps": best_at}
        best = {"eval_data": rows, "early_stopping_patience": 1}
    config = {"init_r": 5, "target_r": 2, "warmup_share": 0.5, "final_share": 0.1}
    result = train("adalora", model=qwen2, data=rows, out=tmp_path / "a", config=config, training=training, **best)
    assert (result.steps < 12) == bool(best_at)
    found = {name: len(t) for name, t in tensors(tmp_path / "a").items() if name.endswith("lora_E")}
    assert sum(found.values()) == 2 * len(found)
    assert len(set(found.values())) > 1, "ranks move to where they matter"
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert sum(map(sum, fields["rank_pattern"].values())) == 2 * len(found)


def test_a_run_that_diverges_writes_nothing(qwen2: Path, rows: Path, tmp_path: Path):
    training = {**QUICK, "learning_rate": 1e30, "max_grad_norm": 0.0}
    with pytest.raises(TrainerError, match=r"the run diverged .* try a lower learning rate"):
        train("lora", model=qwen2, data=rows, out=tmp_path / "a", training=training)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("packing", [False, True])
def test_rows_of_like_length_can_share_a_batch(packing: bool, qwen2: Path, tmp_path: Path):
    """A batch is then filled up with less; so are those of an evaluation. No two rows fit into a pack."""
    data = write_rows(tmp_path / "d.jsonl", [{"text": "ab" * (4 + i % 4)} for i in range(64)])
    options: dict[str, Any] = {"packing": True, "pack_length": 16} if packing else {}
    filled: dict[str, list[int]] = {"train_dataloader": [], "eval_dataloader": []}

    class Count(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._count(kwargs, "train_dataloader")

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._count(kwargs, "eval_dataloader")

        def _count(self, kwargs: Any, loader: str) -> None:
            filled[loader].append(sum(int((batch["input_ids"] == 0).sum()) for batch in kwargs[loader]))

    for extra in ({}, {"train_sampling_strategy": "group_by_length"}):
        train(
            "lora",
            model=qwen2,
            data=data,
            eval_data=data,
            out=tmp_path / "a",
            training={**QUICK, "max_steps": 1, "eval_strategy": "no", **extra},
            callbacks=[Count()],
            overwrite=True,
            **options,
        )
    for _, grouped in filled.values():
        assert grouped < 0.6 * filled["train_dataloader"][0], filled


def test_gradient_checkpointing_changes_no_number(qwen2: Path, rows: Path, tmp_path: Path):
    for method in ("lora", "prefix"):
        for name, extra in ((f"{method}-a", {}), (f"{method}-b", {"gradient_checkpointing": True})):
            train(method, model=qwen2, data=rows, out=tmp_path / name, training={**QUICK, **extra})
        first, second = tensors(tmp_path / f"{method}-a"), tensors(tmp_path / f"{method}-b")
        for name, tensor in first.items():
            torch.testing.assert_close(tensor, second[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_bfloat16_base_is_trained_in_float32_tensors(rows: Path, tmp_path: Path):
    base = save_base(tmp_path / "base", "llama", torch.bfloat16)
    result = train("dora", model=base, data=rows, out=tmp_path / "a", training=QUICK)
    assert result.model.dtype == torch.bfloat16
    assert {t.dtype for t in tensors(tmp_path / "a").values()} == {torch.float32}
    assert result.metrics["train_loss"] < 12


def test_the_folder_is_pefts_with_a_card(qwen2: Path, rows: Path, tmp_path: Path):
    result = train("lora", model=qwen2, data=rows, out=tmp_path / "a", training={**QUICK, "warmup_ratio": 0.1})
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(qwen2)
    card = (tmp_path / "a" / "README.md").read_text()

    for fact in (
        file_digest(rows),
        "64 rows",
        "| seed | 42 |",
        "| warmup_steps | 0.1 |",
        "| train_loss |",
        "| torch |",
    ):
        assert fact in card
    assert f"{result.metrics['train_loss']:.6g}" in card


def test_a_taken_folder_is_not_overwritten_unasked(qwen2: Path, rows: Path, tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").write_text("keep")
    with pytest.raises(OptionError, match="is not empty; give --overwrite"):
        train("lora", model=qwen2, data=rows, out=tmp_path / "a", training=QUICK)
    train("lora", model=qwen2, data=rows, out=tmp_path / "a", training=QUICK, overwrite=True)
    assert (tmp_path / "a" / "adapter_config.json").exists()


def test_a_dry_run_counts_and_writes_nothing(
    qwen2: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    result = train("dora", model=qwen2, data=rows, out=tmp_path / "a", dry_run=True, config={"r": 2})
    shown = capsys.readouterr().err
    total = sum(p.numel() for p in result.adapter.parameters.values())
    assert f"trainable parameters: {total:,} " in shown
    assert "model.layers.*.mlp.down_proj" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "/no/such/model"}, "model: /no/such/model cannot be loaded as a causal LM"),
        ({"training": {"nonsense": 1}}, "training arguments: .*nonsense"),
        ({"training": {"warmup_ratio": 2.0}}, "warmup-ratio: expected 0 or more and below 1"),
        ({"config": {"rank": 4}}, "rank: no such option; expected one of r, lora_alpha"),
        (
            {"training": {"learning_rate": float("nan")}},
            "learning-rate: expected a finite number of 0 or more, got nan",
        ),
        ({"max_length": 0}, "max-length: expected 1 or more, got 0"),
        ({"early_stopping_patience": 2}, "early-stopping-patience: needs rows to evaluate on"),
        ({"speed": "fast"}, "speed: no such option; expected one of r, lora_alpha"),
        ({"r": 4, "config": {"r": 8}}, "r: expected it once, got 8 and 4"),
        ({"r": "8"}, "r: expected int, got '8'"),
        ({"r": True}, "r: expected int, got True"),
        ({"lora_alpha": "a lot"}, "lora-alpha: expected float, got 'a lot'"),
        ({"target_modules": ["q_proj", 3]}, r"target-modules: expected str or list\[str\], got \['q_proj', 3\]"),
        ({"rank_pattern": {"q_proj": "4"}}, r"rank-pattern: expected dict\[str, int\], got "),
        ({"max_length": "long"}, "max-length: expected int or auto, got 'long'"),
        ({"packing": "yes"}, "packing: expected bool, got 'yes'"),
        ({"model": 3}, "model: expected str, got 3"),
        ({"sweep": "r=4,8"}, "sweep: trains several adapters: run `peftmux train lora --sweep`"),
        ({"ensemble": 2}, "ensemble: trains several adapters: run `peftmux train lora --ensemble`"),
    ],
)
def test_bad_options_are_refused_by_name(
    options: dict[str, Any], message: str, qwen2: Path, rows: Path, tmp_path: Path
):
    with pytest.raises(OptionError, match=message):
        train("lora", **{"model": qwen2, "data": rows, "out": tmp_path / "a", **options})
    assert list(tmp_path.iterdir()) == []


def test_options_go_by_their_flags_names(qwen2: Path, rows: Path, tmp_path: Path):
    """From Python the same run is given flat, or in the groups that its options belong to."""
    train("lora", model=qwen2, data=rows, out=tmp_path / "flat", r=3, max_steps=2, seed=5, max_length=64)
    grouped: dict[str, Any] = {"config": {"r": 3}, "training": {"max_steps": 2, "seed": 5}}
    train("lora", model=str(qwen2), data=str(rows), out=tmp_path / "grouped", max_length=64, **grouped)
    assert_equal(tensors(tmp_path / "flat"), tensors(tmp_path / "grouped"))
    numbers: dict[str, Any] = {"r": np.int64(3), "lora_alpha": np.float32(16), "rank_pattern": {"x": np.int64(2)}}
    numbers |= {"append_eos": np.True_, "max_length": np.int64(64), "max_steps": np.int32(2), "seed": np.int64(5)}
    train("lora", model=qwen2, data=rows, out=tmp_path / "numpy", **numbers)
    assert_equal(tensors(tmp_path / "flat"), tensors(tmp_path / "numpy"))
    with pytest.raises(OptionError, match="lora-alpha: expected a finite number, got nan"):
        train("lora", model=qwen2, data=rows, out=tmp_path / "nan", lora_alpha=np.float32("nan"))
    members = [tmp_path / "flat", tmp_path / "flat"]  # folders within an option, as paths
    with pytest.raises(TrainerError, match="flat"):
        train("fusion", model=qwen2, data=rows, out=tmp_path / "fused", adapters=members, max_steps=1)


def test_runs_that_are_killed_at_any_time(qwen2: Path, rows: Path, tmp_path: Path):
    """Nothing or a whole adapter is there, and what was cut off ends with the same bits."""
    script = Path(__file__).with_name("killed_runs.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, (script, qwen2, rows, tmp_path)), "6"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    runs = json.loads(done.stdout.splitlines()[-1])
    for run in runs:
        ended = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}[run["signal"]]
        assert run["status"] in (ended, 0), run
        hidden = {name for name in run["left"] if name.startswith(".")}
        assert set(run["left"]) - hidden <= {"a", "a.checkpoints"}, run
        assert not hidden or run["signal"] == signal.SIGKILL, run
        assert run["status_again"] == 0, run
        assert run["same"], run
        assert run["wrote"] or set(run["after"]) == {"a", "a.checkpoints"}, run
    assert sum(run["resumed"] and not run["wrote"] for run in runs) >= 3, "too few were cut off in the middle"
