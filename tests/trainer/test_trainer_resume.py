"""A run that was cut off and resumed ends as if it had not been."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from peftmux.adapters.aside import folder_held
from peftmux.trainer import OptionError, train
from peftmux.trainer.run.huggingface_trainer import AdapterTrainer
from peftmux.trainer.run.loop import TrainResult
from tests.trainer.method_runs import QUICK, assert_equal, tensors
from tests.trainer.tiny_models import copy_task, write_rows

SAVES = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 3}


class CutOff(TrainerCallback):
    """Ends the run once the checkpoint of a step is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.seen[state.global_step] = logs["loss"]


def check_goes_on(run: dict[str, Any], folder: Path, cut_at: int) -> TrainResult:
    whole_log, cut_log = Losses(), Losses()
    whole = train("lora", **run, out=folder / "whole", callbacks=[whole_log])
    with pytest.raises(KeyboardInterrupt):
        train("lora", **run, out=folder / "cut", callbacks=[CutOff(cut_at)])
    cut = train("lora", **run, out=folder / "cut", resume=True, callbacks=[cut_log])
    assert cut.steps == whole.steps
    assert_equal(tensors(folder / "cut"), tensors(folder / "whole"))
    assert cut.metrics["train_loss"] == whole.metrics["train_loss"]
    assert cut_log.seen == {step: loss for step, loss in whole_log.seen.items() if step in cut_log.seen}
    assert f"| train_loss | {whole.metrics['train_loss']:.6g} |" in (folder / "cut" / "README.md").read_text()
    return cut


@pytest.mark.parametrize("before_the_end", [0, 2])
def test_early_stopping_goes_on_counting(before_the_end: int, qwen2: Path, rows: Path, tmp_path: Path):
    """Also where the run was cut off after the evaluation that stopped it."""
    held_out = write_rows(tmp_path / "eval.jsonl", copy_task(16, seed=1))
    training = {**QUICK, "max_steps": 60, "learning_rate": 0.3, "eval_strategy": "steps", "eval_steps": 2}
    run: dict[str, Any] = {"model": qwen2, "data": rows, "eval_data": held_out, "training": training}
    run["early_stopping_patience"] = 3
    steps = train("lora", **run, out=tmp_path / "first").steps
    assert steps < 60
    check_goes_on(run, tmp_path, steps - before_the_end)


@pytest.mark.parametrize("cut_at", [2, 4, 6])
def test_the_loss_is_that_of_the_whole_run(cut_at: int, qwen2: Path, rows: Path, tmp_path: Path):
    """6 is the last step, in the middle of an epoch: none is made after it."""
    run = {"model": qwen2, "data": rows, "training": {**QUICK, **SAVES}}
    assert check_goes_on(run, tmp_path, cut_at).steps == 6


def test_groups_by_length_are_the_same_in_each_epoch(qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = write_rows(tmp_path / "d.jsonl", [{"text": "ab" * (1 + i % 7) + "cdefgh"[i % 6]} for i in range(32)])
    orders: list[list[tuple[int, ...]]] = []
    step = AdapterTrainer.training_step

    def seen(self: AdapterTrainer, model: Any, inputs: Any, *rest: Any) -> Any:
        if not self.state.global_step:
            orders.append([])
        orders[-1].append(tuple(inputs["input_ids"].flatten().tolist()))
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(AdapterTrainer, "training_step", seen)
    training = {**QUICK, **SAVES, "max_steps": 20, "per_device_train_batch_size": 4}
    training["train_sampling_strategy"] = "group_by_length"
    check_goes_on({"model": qwen2, "data": data, "training": training}, tmp_path, 10)
    whole = orders[0]
    assert set(whole[:8]) != set(whole[8:16]), "each epoch has an order of its own"


def test_another_base_or_another_rate_is_refused(qwen2: Path, rows: Path, tmp_path: Path):
    other, moved = tmp_path / "other", tmp_path / "moved"
    shutil.copytree(qwen2, other)
    shutil.copytree(qwen2, moved)
    weights = load_file(other / "model.safetensors")
    save_file({name: t + 0.01 for name, t in weights.items()}, other / "model.safetensors", {"format": "pt"})
    constant = {**QUICK, **SAVES, "lr_scheduler_type": "constant"}
    run: dict[str, Any] = {"data": rows, "out": tmp_path / "a", "overwrite": True}
    train("lora", **run, model=qwen2, training=constant)
    with pytest.raises(OptionError, match=r"resume: .*checkpoint-\d+ was written with another base"):
        train("lora", **run, model=other, training=constant, resume=True)
    with pytest.raises(OptionError, match=r"written with learning_rate .*, got 0\.5"):
        train("lora", **run, model=qwen2, training={**constant, "learning_rate": 0.5}, resume=True)
    longer = train("lora", **run, model=moved, training={**constant, "max_steps": 8, "save_steps": 4}, resume=True)
    whole = train("lora", **{**run, "out": tmp_path / "b"}, model=qwen2, training={**constant, "max_steps": 8})
    assert longer.steps == 8
    assert_equal(tensors(longer.out), tensors(whole.out))


@pytest.mark.parametrize(
    ("name", "older"), [("model", {}), ("model", {"model": "0f" * 32}), ("learning_rate", {})], ids=str
)
def test_an_older_versions_checkpoint_is_refused(
    name: str, older: dict[str, str], qwen2: Path, rows: Path, tmp_path: Path
):
    """older: what it noted otherwise."""
    run: dict[str, Any] = {"model": qwen2, "data": rows, "out": tmp_path / "a", "overwrite": True}
    train("lora", **run, training={**QUICK, **SAVES})
    for noted in (tmp_path / "a.checkpoints").glob("*/run.json"):
        others = {k: v for k, v in json.loads(noted.read_text()).items() if k != name}
        noted.write_text(json.dumps({**others, **older}))
    with pytest.raises(OptionError, match=f"of an older version, which did not note its {name}"):
        train("lora", **run, training={**QUICK, **SAVES}, resume=True)


def test_a_longer_run_of_a_falling_rate_is_refused(qwen2: Path, rows: Path, tmp_path: Path):
    run: dict[str, Any] = {"model": qwen2, "data": rows, "out": tmp_path / "a", "overwrite": True}
    train("lora", **run, training={**QUICK, **SAVES})
    with pytest.raises(OptionError, match=r"max-steps: the schedule linear .*expected 6 steps .*, got 8"):
        train("lora", **run, training={**QUICK, **SAVES, "max_steps": 8}, resume=True)


def test_the_newest_checkpoint_is_gone_on_from_not_the_highest(qwen2: Path, rows: Path, tmp_path: Path):
    """A run that replaces an older one of more steps, and is cut off."""
    run: dict[str, Any] = {"model": qwen2, "data": rows, "out": tmp_path / "a", "overwrite": True}
    constant = {**QUICK, **SAVES, "lr_scheduler_type": "constant"}
    train("lora", **run, training={**constant, "max_steps": 8})
    newer = {**constant, "learning_rate": 3e-3, "max_steps": 4}
    train("lora", **run, training=newer)
    resumed = train("lora", **run, training=newer, resume=True)
    assert resumed.steps == 4


def test_fewer_steps_than_are_done_are_refused(qwen2: Path, rows: Path, tmp_path: Path):
    run: dict[str, Any] = {"model": qwen2, "data": rows, "out": tmp_path / "a", "overwrite": True}
    constant = {**QUICK, **SAVES, "lr_scheduler_type": "constant"}
    train("lora", **run, training=constant)
    with pytest.raises(OptionError, match="max-steps: expected 6 or more, which the checkpoint has done; got 4"):
        train("lora", **run, training={**constant, "max_steps": 4}, resume=True)


class Held(TrainerCallback):
    """Whether somebody else could write to a folder during the run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.refused: list[bool] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        try:
            with folder_held(self.folder):
                self.refused.append(False)
        except BlockingIOError:
            self.refused.append(True)


def test_two_runs_never_write_checkpoints_to_one_folder(qwen2: Path, rows: Path, tmp_path: Path):
    run: dict[str, Any] = {"model": qwen2, "data": rows, "out": tmp_path / "a", **QUICK, **SAVES, "max_steps": 2}
    checkpoints = tmp_path / "a.checkpoints"
    with (
        folder_held(checkpoints),
        pytest.raises(OptionError, match=r"another run is writing checkpoints to .*a\.check"),
    ):
        train("lora", **run)
    assert [*checkpoints.iterdir()] == []
    assert not (tmp_path / "a").exists()
    held = Held(checkpoints)
    train("lora", **run, callbacks=[held])
    assert held.refused == [True, True]
    with folder_held(checkpoints):
        assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-2"]


def test_what_a_loaders_worker_has_open_holds_nothing(tmp_path: Path):
    """A forked process that lives longer than the run."""
    asked, answered = os.pipe()
    with folder_held(tmp_path / "a"):
        child = os.fork()
        if child == 0:
            os.read(asked, 1)
            os._exit(0)
    try:
        with folder_held(tmp_path / "a"):
            pass
    finally:
        os.write(answered, b"x")
        os.waitpid(child, 0)
        os.close(asked)
        os.close(answered)
