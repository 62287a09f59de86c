"""`accelerate launch` with two processes on CPUs: one writes, and the tensors are those of one with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from peftmux.trainer import OptionError, train
from peftmux.trainer.jobs.file import job_spec
from peftmux.trainer.jobs.run import JobRun
from peftmux.trainer.settings.arguments import check_launcher
from tests.trainer.method_runs import assert_equal, tensors
from tests.trainer.process_runs import Rewards
from tests.trainer.tiny_models import write_rows

RUNNER = Path(__file__).with_name("process_runs.py")
TOLERANCE = 5e-5
"""float32: the two halves of a sum are added up apart, seen through Adam. Learning rates are up to 3e-2."""
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("lora", {}, {"gradient_accumulation_steps": 2}),
    "dora": ("dora", {}, {"save_strategy": "steps", "save_steps": 3, "logging_steps": 2}),
    "prefix": ("prefix", {"config": {"num_virtual_tokens": 3}}, {"gradient_checkpointing": True}),
    "prompt": ("prompt", {"config": {"num_virtual_tokens": 3}}, {}),
    "adalora": ("adalora", {"config": {"init_r": 3, "target_r": 2}}, {}),
    "ladder": ("ladder", {}, {}),
    "ia3": ("ia3", {}, {}),
    "dpo": ("lora", {"loss": "dpo"}, {"logging_steps": 3}),
    "kto": ("lora", {"loss": "kto", "beta": 1.0}, {"learning_rate": 1e-2, "logging_steps": 3}),
    "mixlora": ("mixlora", {"config": {"balance_weight": 1.0, "num_experts": 3}}, {}),
}
"""Method, options, training."""
if find_spec("torchao"):  # which `peftmux[test]` brings on Linux
    RUNS["float8"] = ("lora", {"quantization": "fp8"}, {})
Folders = tuple[Path, Path, str, dict[str, list[tuple[float, float]]]]
LAUNCH = ("--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    """CPU processes: without a GPU that is what --multi_gpu gives."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH, "--main_process_port=0", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)


def options(case: str, base: Path, folder: Path, batch: int) -> dict[str, Any]:
    method, given, training = RUNS[case]
    data = folder.parent / f"{given.get('loss', 'rows')}.jsonl"
    steps = {"max_steps": 6, "per_device_train_batch_size": batch, "disable_tqdm": True, "use_cpu": True}
    out = {"model": str(base), "data": str(data), "eval_data": str(data), "out": str(folder / case)}
    return {"method": method, **out, **given, "training": {**steps, **training}}


@pytest.fixture(scope="module")
def folders(qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Every run by two processes and by one, what the two said, and what the one logged.

    Rows differ in length, and in what is learned.
    """
    folder = tmp_path_factory.mktemp("processes")
    texts = [{"prompt": "ab" * (1 + i % 5), "completion": "cd" * (1 + i % 3)} for i in range(64)]
    write_rows(folder / "rows.jsonl", texts)
    pairs = [
        {"prompt": t["prompt"], "chosen": t["completion"], "rejected": "e" * (1 + i % 4)} for i, t in enumerate(texts)
    ]
    write_rows(folder / "dpo.jsonl", pairs)
    write_rows(folder / "kto.jsonl", [{**t, "label": i % 3 > 0} for i, t in enumerate(texts)])
    two, one = folder / "two", folder / "one"
    two.mkdir()
    (two / "runs").write_text(json.dumps([options(case, qwen2, two, 2) for case in RUNS]))
    done = launch(str(RUNNER), str(two / "runs"))
    assert done.returncode == 0, done.stderr[-3000:]
    logged = {case: Rewards() for case in RUNS}
    for case, rewards in logged.items():
        train(**options(case, qwen2, one, 4), callbacks=[rewards])
    return two, one, done.stderr, {case: rewards.seen for case, rewards in logged.items()}


@pytest.mark.parametrize("case", RUNS)
def test_two_processes_train_what_one_does(case: str, folders: Folders):
    two, one = (tensors(folder / case) for folder in folders[:2])
    assert two.keys() == one.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=TOLERANCE, msg=name)


def test_one_process_writes(folders: Folders):
    two, _, said, _ = folders
    first, second = (json.loads((two / f"{rank}.json").read_text()) for rank in (0, 1))
    assert all(run["digest"] for run in first)
    assert not any(run["digest"] for run in second)
    losses = [[run["metrics"]["eval_loss"] for run in ended] for ended in (first, second)]
    assert losses[0] == losses[1]
    assert said.count("trainable parameters:") == len(RUNS)
    assert said.count("step 6/6 train_runtime=") == len(RUNS)
    assert said.count("step 6/6 eval_loss=") == len(RUNS)
    assert {path.name for path in two.iterdir()} == {*RUNS, "dora.checkpoints", "runs", "0.json", "1.json"}


def test_rewards_are_of_all_processes(folders: Folders):
    two, _, _, logged = folders
    for rank in (0, 1):
        for case, run in zip(RUNS, json.loads((two / f"{rank}.json").read_text()), strict=True):
            assert len(run["rewards"]) == (2 if case in ("dpo", "kto") else 0)
            assert [*map(tuple, run["rewards"])] == [pytest.approx(pair, abs=1e-5) for pair in logged[case]]


def test_a_checkpoint_of_two_is_resumed_by_two(qwen2: Path, folders: Folders, tmp_path: Path):
    two, *_ = folders
    run = options("dora", qwen2, two, 2)
    last = two / "dora.checkpoints" / "checkpoint-6" / "trainer_state.json"
    last.unlink()  # as a run that was killed while it wrote it
    before = tensors(two / "dora")
    (tmp_path / "runs").write_text(json.dumps([{**run, "resume": True, "overwrite": True}]))
    done = launch(str(RUNNER), str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr[-3000:]
    resumed = json.loads((tmp_path / "0.json").read_text())[0]
    whole = json.loads((two / "0.json").read_text())[list(RUNS).index("dora")]
    assert resumed["steps"] == 6
    assert resumed["metrics"]["train_loss"] == pytest.approx(whole["metrics"]["train_loss"], rel=1e-6)
    assert_equal(tensors(two / "dora"), before)


def test_a_launcher_that_starts_one_of_several_is_refused():
    alone = {"ACCELERATE_USE_CPU": "True"}
    check_launcher(alone)
    check_launcher({**alone, "MASTER_ADDR": "127.0.0.1", "RANK": "0"})
    with pytest.raises(OptionError, match="with --cpu starts one process only"):
        check_launcher({**alone, "MASTER_ADDR": "127.0.0.1"})


def test_jobs_are_for_one_process(qwen2: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transformers.TrainingArguments.world_size", 2)
    run = options("lora", qwen2, folders[0].parent / "jobs", 2)
    given = {name: run[name] for name in ("model", "data", "out")}
    with pytest.raises(OptionError, match="jobs: are trained in one process, got 2"):
        JobRun([job_spec("a", "lora", given, "here")]).run()
