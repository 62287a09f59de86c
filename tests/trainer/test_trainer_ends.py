"""What a run ends with: an adapter wherever it was to be, numbers that were measured once, nothing that was made up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator  # type: ignore[import-untyped]
from transformers import AutoTokenizer, Trainer, TrainerCallback

from peftmux.adapters.aside import folder_aside
from peftmux.trainer import DataError, TrainerError, train
from peftmux.trainer.run.huggingface_trainer import AdapterTrainer
from tests.trainer.method_runs import QUICK, assert_equal, tensors
from tests.trainer.tiny_models import copy_task, save_base, write_rows


class Logs(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.evaluated: list[int] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated.append(state.global_step)


def test_a_card_can_say_whatever_transformers_takes(qwen2: Path, rows: Path, tmp_path: Path):
    given = {**QUICK, "max_steps": 1, "accelerator_config": {"split_batches": False}}
    train("lora", model=qwen2, data=rows, out=tmp_path / "a", training=given)
    assert "| accelerator_config | " in (tmp_path / "a" / "README.md").read_text()


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_written_through(there: bool, qwen2: Path, rows: Path, tmp_path: Path):
    if there:
        (tmp_path / "disk").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "disk")
    train("lora", model=qwen2, data=rows, out=tmp_path / "a", training={**QUICK, "max_steps": 1})
    assert (tmp_path / "a").is_symlink()
    assert (tmp_path / "disk" / "adapter_config.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "disk"}


def test_links_in_a_circle_are_refused(qwen2: Path, rows: Path, tmp_path: Path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(TrainerError, match=r"^out: "):
        train("lora", model=qwen2, data=rows, out=tmp_path / "a", training=QUICK)


def test_only_the_process_that_writes_looks_at_the_place(
    qwen2: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The others would find it held by the one that is clearing it."""
    monkeypatch.setattr("transformers.TrainingArguments.process_index", 1)
    with folder_aside(tmp_path / "a"):
        result = train("lora", model=qwen2, data=rows, out=tmp_path / "a", training={**QUICK, "max_steps": 1})
    assert result.digest == ""
    assert list(tmp_path.iterdir()) == []


def test_what_the_last_step_has_measured_is_not_measured_again(qwen2: Path, rows: Path, tmp_path: Path):
    log = Logs()
    given = {"num_train_epochs": 2, "per_device_train_batch_size": 16, "disable_tqdm": True}
    run: dict[str, Any] = {"model": qwen2, "data": rows, "eval_data": rows, "training": given}
    result = train("lora", **run, out=tmp_path / "a", callbacks=[log])
    assert log.evaluated == [4, 8]
    log = Logs()
    again = train("lora", **{**run, "training": {**given, "eval_strategy": "no"}}, out=tmp_path / "b", callbacks=[log])
    assert log.evaluated == [8]
    assert result.metrics["eval_loss"] == again.metrics["eval_loss"]


def test_a_run_that_diverges_says_so_in_its_log(qwen2: Path, rows: Path, tmp_path: Path):
    log = Logs()
    training = {**QUICK, "learning_rate": 1e30, "max_grad_norm": 0.0}
    with pytest.raises(TrainerError, match="the run diverged"):
        train("lora", model=qwen2, data=rows, out=tmp_path / "a", training=training, callbacks=[log])
    assert not all(map(math.isfinite, log.losses))


def test_a_step_that_is_left_out_moves_no_schedule(
    qwen2: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As one whose float16 gradients overflow; AdaLoRA would take them for a measure."""
    run: dict[str, Any] = {"model": qwen2, "data": rows, "training": {**QUICK, "max_steps": 1}}
    made = train("adalora", **run, out=tmp_path / "a")
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", True)
    left = train("adalora", **run, out=tmp_path / "b")

    def moved(result: Any) -> bool:
        return any(t.any() for name, t in result.adapter.state().items() if "sensitivity" in name)

    assert moved(made)
    assert not moved(left)


def test_tokens_that_the_base_does_not_have(rows: Path, tmp_path: Path):
    """The padding's is never seen; one in the data is refused with its line."""
    base = save_base(tmp_path / "base", "qwen2")
    plain = train("lora", model=base, data=rows, out=tmp_path / "plain", training=QUICK)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens([f"<new{i}>" for i in range(64)])
    tokenizer.save_pretrained(base)
    assert tokenizer.convert_tokens_to_ids("<new63>") >= plain.model.get_input_embeddings().weight.shape[0]
    train("lora", model=base, data=rows, out=tmp_path / "padded", training=QUICK)
    assert_equal(tensors(tmp_path / "plain"), tensors(tmp_path / "padded"))
    data = write_rows(tmp_path / "d.jsonl", [*copy_task(1), {"prompt": "a <new63>", "completion": "b"}])
    with pytest.raises(DataError, match=r"d\.jsonl:2: token \d+ of the tokenizer is not in the base's embedding"):
        train("lora", model=base, data=data, out=tmp_path / "a", training=QUICK)


def test_a_passs_work_is_transformers_estimate(
    qwen2: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Which is counted once, not in each pass."""
    found: list[tuple[int, int]] = []
    own = AdapterTrainer.floating_point_ops

    def both(trainer: AdapterTrainer, inputs: dict[str, Any]) -> int:
        found.append((own(trainer, inputs), Trainer.floating_point_ops(trainer, inputs)))
        return found[-1][0]

    monkeypatch.setattr(AdapterTrainer, "floating_point_ops", both)
    train("lora", model=qwen2, data=rows, out=tmp_path / "a", training=QUICK)
    assert len(found) == QUICK["max_steps"]
    assert all(mine == theirs > 0 for mine, theirs in found)
