"""What a run cannot be begun with is refused by name, before the base is loaded and before anything is written."""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from peftmux.trainer import OptionError, TrainerError, train
from peftmux.trainer.cli import main
from peftmux.trainer.methods import METHODS
from peftmux.trainer.settings.arguments import training_arguments
from peftmux.trainer.settings.options import RunOptions, build_config
from tests.trainer.method_runs import QUICK, assert_equal, tensors
from tests.trainer.tiny_models import write_rows

SAVING = {**QUICK, "save_strategy": "steps", "save_steps": 2}
NO_ROWS = "needs rows to evaluate on: give --eval-data"


def refusal(rows: Path, folder: Path, given: dict[str, Any]) -> str:
    """`model` is a base that is not there: what is refused first is refused without it."""
    with pytest.raises(OptionError) as caught:
        train("lora", **{"model": folder / "no-base", "data": rows, "out": folder / "a", **given})
    assert list(folder.iterdir()) == []
    return str(caught.value)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"per_device_train_batch_size": 0}, "per-device-train-batch-size: expected 1 or more, got 0"),
        ({"per_device_eval_batch_size": -1}, "per-device-eval-batch-size: expected 1 or more, got -1"),
        ({"gradient_accumulation_steps": 0}, "gradient-accumulation-steps: expected 1 or more, got 0"),
        ({"max_steps": 0}, "max-steps: expected 1 or more, got 0"),
        ({"max_steps": -5}, "max-steps: expected 1 or more, got -5"),
        ({"num_train_epochs": 0}, "num-train-epochs: expected more than 0, got 0"),
        ({"num_train_epochs": math.nan}, "num-train-epochs: expected more than 0, got nan"),
        ({"logging_steps": -1}, "logging-steps: expected more than 0, got -1"),
        ({"save_strategy": "steps", "save_steps": 0}, "save-steps: expected more than 0, got 0"),
        ({"weight_decay": math.nan}, "weight-decay: expected 0 or more, got nan"),
        ({"max_grad_norm": -1.0}, "max-grad-norm: expected 0 or more, got -1.0"),
        ({"adam_beta1": 2.0}, "adam-beta1: expected 0 to 1, got 2.0"),
        ({"warmup_steps": math.nan}, "warmup-steps: expected 0 or more, got nan"),
        ({"seed": -1}, "seed: expected 0 to 4294967295, got -1"),
        ({"seed": 10**20}, "seed: expected 0 to 4294967295, got 1"),
        ({"dataloader_num_workers": -1}, "dataloader-num-workers: expected 0 or more, got -1"),
        ({"optim": "galore_adamw"}, "optim: galore_adamw is for training whole weights"),
        ({"optim": "grokadamw"}, "optim: grokadamw cannot be had: .*grokadamw"),
        ({"optim_args": "fast"}, "optim: adamw_torch_fused cannot be had"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr-scheduler-type: cosine_with_min_lr cannot be had: .*min_lr"),
        ({"lr_scheduler_kwargs": "fast"}, "lr-scheduler-kwargs: expected a JSON object, got 'fast'"),
        ({"push_to_hub": True}, "push-to-hub: is not offered: `hf upload"),
        ({"hub_model_id": "me/mine"}, "hub-model-id: is not offered"),
        ({"fp16": True}, "fp16: is for GPUs, .*: give --bf16"),
        ({"bf16_full_eval": True}, "bf16-full-eval: would round what is trained"),
        ({"use_liger_kernel": True}, "use-liger-kernel: is not offered"),
        ({"eval_strategy": "steps"}, f"eval-strategy: {NO_ROWS}"),
        ({"eval_on_start": True}, f"eval-on-start: {NO_ROWS}"),
        ({"load_best_model_at_end": True}, f"load-best-model-at-end: {NO_ROWS}"),
        ({"save_strategy": "best"}, f"save-strategy: {NO_ROWS}"),
        ({"metric_for_best_model": "accuracy"}, "metric-for-best-model: expected eval_loss, .* got 'accuracy'"),
        ({"accelerator_config": "no-file"}, "training arguments: .*no-file"),
        ({"gradient_checkpointing_kwargs": "x"}, "gradient-checkpointing-kwargs: expected a JSON object, got 'x'"),
        (
            {"resume_from_checkpoint": "gone"},
            "resume-from-checkpoint: expected a checkpoint's folder, found noth",
        ),
    ],
)
def test_training_arguments_that_cannot_be_meant(training: dict[str, Any], message: str, rows: Path, tmp_path: Path):
    assert re.match(message, refusal(rows, tmp_path, {"training": training}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, "model: expected a name, got an empty one"),
        ({"out": ""}, "out: expected a name, got an empty one"),
        ({"out": "/proc/no/a"}, "out: /proc/no cannot be written to"),
        ({"out": "/dev/null/a"}, "out: /dev/null cannot be written to: Not a directory"),
        ({"training": {**SAVING, "output_dir": "/dev/null"}}, "output-dir: /dev/null cannot be written to"),
        ({"publish": "/no/such/folder"}, "publish: expected a folder that a server watches, found nothing at /no"),
        ({"publish": "/dev/null"}, "publish: expected a folder that a server watches, found a file at /dev/null"),
        ({"config": {"lora_alpha": math.nan}}, "lora-alpha: expected a finite number, got nan"),
        ({"config": {"lora_alpha": 0}}, "lora-alpha: expected more than 0, got 0"),
        ({"config": {"alpha_pattern": {"q_proj": math.inf}}}, "alpha-pattern: expected a finite number"),
        ({"loss": "dpo", "training": {"label_smoothing_factor": 0.1}}, "label-smoothing-factor: .*not for --loss dpo"),
        (
            {"task": "token", "training": {"label_smoothing_factor": 0.1}},
            "label-smoothing-factor: .*not for --task t",
        ),
        ({"over_long": "Drop"}, "over-long: expected error or truncate or drop, got 'Drop'"),
        ({"task": "sequences"}, "task: expected generation or sequence or token, got 'sequences'"),
        ({"quantization": "nf8"}, "quantization: expected nf4 or int8 or fp8, got 'nf8'"),
        ({"max_length": "10"}, "max-length: expected int or auto, got '10'"),
        ({"resume": True, "sweep": "r=1,2"}, "resume: goes on with one run"),
        ({"resume": True, "training": {"resume_from_checkpoint": "x"}}, "resume: takes the newest checkpoint"),
        (
            {"eval_data": "d", "early_stopping_patience": 1, "training": {"eval_strategy": "no"}},
            "early-stopping-patience: stops by evaluations: not with --eval-strategy no",
        ),
        (
            {"packing": True, "training": {"train_sampling_strategy": "batch_rebalance"}},
            "train-sampling-strategy: batch_rebalance weighs rows by length: not with --packing",
        ),
        ({"resume": True}, r"resume: found no complete checkpoint in .*a\.checkpoints"),
    ],
)
def test_options_and_places_that_cannot_be_meant(options: dict[str, Any], message: str, rows: Path, tmp_path: Path):
    assert re.match(message, refusal(rows, tmp_path, options))


@pytest.mark.parametrize(
    ("method", "name", "value", "message"),
    [
        ("prompt", "prompt_init", "labelz", "expected data or text or vocabulary or labels or random, got 'labelz'"),
        ("bitfit", "bias_terms", "query", "expected all or query_intermediate, got 'query'"),
        ("shira", "mask", ["random"], r"expected random or magnitude, got \['random'\]"),
        ("vora", "image_std", [math.nan, 1.0, 1.0], r"expected a finite number, got \[nan, 1.0, 1.0\]"),
    ],
)
def test_values_that_no_flag_would_take(method: str, name: str, value: Any, message: str):
    with pytest.raises(OptionError, match=f"^{name.replace('_', '-')}: {message}"):
        build_config(METHODS[method].config_class, {name: value})


@pytest.mark.parametrize("strategy", ["no", SaveStrategy.NO])
def test_where_nothing_is_saved_no_folder_is_named(strategy: str, tmp_path: Path):
    options = RunOptions(model="m", data="d", out=str(tmp_path / "a"))
    args = training_arguments(options, {"save_strategy": strategy})
    assert args.output_dir == tempfile.gettempdir()


def test_a_run_that_makes_no_step_writes_nothing(qwen2: Path, rows: Path, tmp_path: Path):
    training = {**QUICK, "dataloader_drop_last": True, "per_device_train_batch_size": 100}
    with pytest.raises(TrainerError, match="no step was made: nothing written"):
        train("lora", model=qwen2, data=rows, out=tmp_path / "a", training=training)
    assert list(tmp_path.iterdir()) == []


def test_layers_are_chosen_among_all_and_have_to_be_there(qwen2: Path, rows: Path, tmp_path: Path):
    run: dict[str, Any] = {"model": qwen2, "data": rows, "out": tmp_path / "a", "training": {**QUICK, "max_steps": 1}}
    train("lora", **run, config={"layers_to_transform": [1]})
    assert {name.split("layers.")[1][0] for name in tensors(tmp_path / "a")} == {"1"}
    for layer in (2, -1):
        with pytest.raises(OptionError, match=f"layers-to-transform: no layer {layer} has such linear layers"):
            train("lora", **run, config={"layers_to_transform": [0, layer]}, overwrite=True)


@pytest.fixture(scope="module")
def saved(qwen2: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps at `a`, with a checkpoint after each 2."""
    folder = tmp_path_factory.mktemp("saved")
    train("lora", model=qwen2, data=rows, out=folder / "a", training=SAVING)
    return folder


def test_a_named_checkpoint_is_gone_on_from(saved: Path, qwen2: Path, rows: Path, tmp_path: Path):
    """The steps before it are not made again, and the bits are those of the whole run."""
    checkpoint = saved / "a.checkpoints" / "checkpoint-4"
    seen: list[int] = []

    class Record(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(state.global_step)

    training = {**QUICK, "resume_from_checkpoint": str(checkpoint)}
    train("lora", model=qwen2, data=rows, out=tmp_path / "b", training=training, callbacks=[Record()])
    assert seen == [5, 6]
    assert_equal(tensors(tmp_path / "b"), tensors(saved / "a"))


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "run.json"])
def test_a_checkpoint_that_lacks_something_is_refused(missing: str, saved: Path, rows: Path, tmp_path: Path):
    whole = saved / "a.checkpoints" / "checkpoint-4"
    part = saved / missing / "a.checkpoints" / "checkpoint-4"
    shutil.copytree(whole, part, ignore=shutil.ignore_patterns(missing))
    lacks = rf"{part} lacks {missing}"
    named = refusal(rows, tmp_path, {"training": {**QUICK, "resume_from_checkpoint": str(part)}})
    assert re.match(f"resume-from-checkpoint: {lacks}", named)
    newest = refusal(rows, tmp_path, {"resume": True, "training": {**QUICK, "output_dir": str(part.parent)}})
    assert re.match(f"resume: {lacks}", newest)


def test_a_checkpoint_of_the_model_only_is_refused(qwen2: Path, rows: Path, tmp_path: Path):
    run: dict[str, Any] = {"model": qwen2, "data": rows, "out": tmp_path / "a"}
    train("lora", **run, training={**SAVING, "save_only_model": True})
    message = r"checkpoint-6 lacks optimizer.pt, scheduler.pt, rng_state.pth \(one of --save-only-model cannot"
    with pytest.raises(OptionError, match=message):
        train("lora", **{**run, "model": tmp_path / "no-base"}, training=SAVING, resume=True, overwrite=True)


def test_another_runs_checkpoint_is_refused_before_the_base_is_loaded(saved: Path, rows: Path, tmp_path: Path):
    given = {"training": {**QUICK, "resume_from_checkpoint": str(saved / "a.checkpoints" / "checkpoint-4"), "seed": 7}}
    assert refusal(rows, tmp_path, given) == "resume: the checkpoint was written with seed 42, got 7"


def test_a_length_is_proposed_from_the_data(qwen2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """200 rows of 10 tokens with their end, two of which are longer: what 99 % have is 10."""
    texts = ["a" * 9] * 198 + ["a" * 29, "a" * 39]
    data = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    words = ["lora", "--model", str(qwen2), "--data", str(data), "--max-steps", "1", "--max-length", "auto"]
    said = "99% of rows have at most 10, the longest 40; --max-length 10 cuts 2 of 200 rows"
    for name, extra, card in (("a", [], "200 rows"), ("b", ["--over-long", "drop"], "198 rows")):
        assert main([*words, "--out", str(tmp_path / name), *extra]) == 0
        assert said in capsys.readouterr().err
        assert card in (tmp_path / name / "README.md").read_text()
    assert main([*words[:-1], "long", "--out", str(tmp_path / "c")]) == 2
    assert "expected a whole number or auto, got 'long'" in capsys.readouterr().err
