"""What jobs draw while they share passes (dropout) is what each draws in its solo run, in every form of batch."""

from __future__ import annotations

import _thread
import dataclasses
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from peftmux.trainer.host.host import Host
from peftmux.trainer.jobs.file import JobSpec, read_jobs, resumed
from peftmux.trainer.jobs.run import JobRun
from peftmux.trainer.jobs.together import Together
from peftmux.trainer.run.huggingface_trainer import AdapterTrainer
from peftmux.trainer.run.loop import run_training
from tests.trainer import tiny_models
from tests.trainer.method_runs import assert_equal, tensors
from tests.trainer.test_trainer_jobs import TOLERANCE, jobs_file
from tests.trainer.tiny_models import save_base, write_rows

DROPS: dict[str, Any] = {"lora_dropout": 0.3, "max_steps": 4}
LSTM = {"encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.4, "num_virtual_tokens": 3, "max_steps": 4}
SPECS: list[dict[str, Any]] = [
    {"name": "plain", "method": "lora", "max_steps": 4},
    {"name": "lora", "method": "lora", "r": 4, "learning_rate": 1e-2, **DROPS},
    {"name": "dora", "method": "dora", "r": 2, "seed": 7, "gradient_accumulation_steps": 2, **DROPS},
    {"name": "head", "method": "lora", "target_modules": ["q_proj", "lm_head"], **DROPS},
    {"name": "budget", "method": "adalora", "init_r": 3, "target_r": 2, **DROPS},
    {"name": "encoder", "method": "p-tuning", **LSTM},
    {"name": "prompt", "method": "prompt", "num_virtual_tokens": 5, "max_steps": 4},
]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of many lengths, so that jobs' batches are filled up for each other."""
    draw = random.Random(4)
    rows = [("".join(draw.choices("abc", k=draw.randint(2, 9))), "".join(draw.choices("AB", k=4))) for _ in range(13)]
    return write_rows(
        tmp_path_factory.mktemp("uneven") / "rows.jsonl", [{"prompt": p, "completion": c} for p, c in rows]
    )


def solo(spec: JobSpec, out: Path) -> dict[str, torch.Tensor]:
    run_training(spec.method, dataclasses.replace(spec.options, out=str(out)), spec.config, spec.training)
    return tensors(out)


@pytest.mark.parametrize("shape", ["llama", "opt"])  # OPT's feed-forward layers are given tokens, not rows
def test_what_is_drawn_is_the_solo_runs(shape: str, uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiny_models.CONFIGS["opt"], "dropout", 0.0)
    base = save_base(tmp_path / "base", shape)
    chosen = [spec for spec in SPECS if shape == "llama" or spec["name"] in ("plain", "lora", "dora")]
    specs = read_jobs(jobs_file(tmp_path, base, uneven, chosen))
    assert JobRun(specs).run().keys() == {spec.name for spec in specs}
    for spec in specs:
        together = tensors(tmp_path / "out" / spec.name)
        for name, tensor in solo(spec, tmp_path / "solo" / spec.name).items():
            torch.testing.assert_close(together[name], tensor, rtol=0, atol=TOLERANCE, msg=f"{spec.name} {name}")


def test_mixtures_and_fusions_stay_within_what_is_stated(qwen2: Path, uneven: Path, tmp_path: Path):
    """A router or a softmax over adapters grows rounding; a difference of any other kind would be in the mean."""
    members = [{"name": name, "method": "pfeiffer", "max_steps": 2, "seed": i} for i, name in enumerate("ab")]
    JobRun(read_jobs(jobs_file(tmp_path, qwen2, uneven, members))).run()
    folders = [str(tmp_path / "out" / name) for name in "ab"]
    own = {"max_steps": 12, "learning_rate": 5e-3}
    chosen: list[dict[str, Any]] = [
        {"name": "fused", "method": "fusion", "adapters": folders, **own},
        {"name": "chosen", "method": "mixlora", **own},
        {"name": "weighed", "method": "loramoe", **own},
        {"name": "directions", "method": "pissa", "r": 2, "lora_dropout": 0.1, **own},
    ]
    specs = read_jobs(jobs_file(tmp_path, qwen2, uneven, chosen))
    JobRun(specs).run()
    for spec in specs:
        together = tensors(tmp_path / "out" / spec.name)
        for name, tensor in solo(spec, tmp_path / "solo" / spec.name).items():
            apart = (together[name] - tensor).abs()
            assert apart.max() <= 1e-3, (spec.name, name)
            assert apart.mean() <= 2e-5, (spec.name, name)


@pytest.mark.parametrize("spec", [SPECS[1], {"name": "chosen", "method": "mixlora", "max_steps": 4}])
def test_a_job_alone_in_its_passes_has_its_solo_runs_bits(
    spec: dict[str, Any], qwen2: Path, uneven: Path, tmp_path: Path
):
    (job,) = read_jobs(jobs_file(tmp_path, qwen2, uneven, [spec]))
    JobRun([job]).run()
    assert_equal(tensors(tmp_path / "out" / job.name), solo(job, tmp_path / "solo"))


def test_a_base_that_draws_gives_each_job_its_own_passes(uneven: Path, tmp_path: Path, capsys: Any):
    base = save_base(tmp_path / "base", "gpt2")
    specs = read_jobs(jobs_file(tmp_path, base, uneven, [SPECS[0], SPECS[1], SPECS[5]]))
    JobRun(specs).run()
    assert capsys.readouterr().err.count("every job has passes of its own") == 1
    for spec in specs:
        assert_equal(tensors(tmp_path / "out" / spec.name), solo(spec, tmp_path / "solo" / spec.name))


def test_rows_that_a_layer_mixes_give_each_job_its_own_passes(
    qwen2: Path, uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    """Found in the middle of the first pass, when masks have been drawn already."""
    places, sizes = 0, Host.sizes

    def last_layer_gathers(self: Host, x: torch.Tensor) -> list[int]:
        nonlocal places
        places += 1
        return sizes(self, x[:-1] if places == 12 else x)

    monkeypatch.setattr(Host, "sizes", last_layer_gathers)
    specs = read_jobs(jobs_file(tmp_path, qwen2, uneven, SPECS[1:3]))
    JobRun(specs).run()
    assert "expected 6 rows of" in capsys.readouterr().err
    assert places == 12
    for spec in specs:
        assert_equal(tensors(tmp_path / "out" / spec.name), solo(spec, tmp_path / "solo" / spec.name))


class Cut(Together):
    """A lost machine in the middle of the run."""

    rounds = 0

    def round(self, jobs: Sequence[Any]) -> None:
        self.rounds += 1
        if self.rounds == 5:
            raise KeyboardInterrupt
        super().round(jobs)


def test_jobs_that_are_cut_off_together_end_with_the_same_bits(qwen2: Path, uneven: Path, tmp_path: Path):
    """Their checkpoints are of one round, so that the rest of the run has the same passes."""
    own = {"max_steps": 7, "save_strategy": "steps", "save_steps": 2}
    names = ("plain", "lora", "budget", "encoder")
    specs = [{**spec, **own} for spec in SPECS if spec["name"] in names]
    specs += [
        {"name": "difference", "method": "diffpruning", "sparsity": 0.1, **own},
        {"name": "after", "method": "houlsby", "adapterdrop": 1, **own},
    ]
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    JobRun(read_jobs(jobs_file(tmp_path / "whole", qwen2, uneven, specs))).run()
    path = jobs_file(tmp_path / "cut", qwen2, uneven, specs)
    with pytest.raises(KeyboardInterrupt):
        JobRun(read_jobs(path), together=Cut).run()
    left = resumed(read_jobs(path))
    assert all(spec.options.resume for spec in left)
    JobRun(left).run()
    for spec in specs:
        assert_equal(*(tensors(tmp_path / run / "out" / spec["name"]) for run in ("whole", "cut")))


def test_a_checkpoint_that_ctrl_c_comes_into_is_the_jobs_own(
    qwen2: Path, uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spec = {**SPECS[1], "save_strategy": "steps", "save_steps": 2}
    specs = read_jobs(jobs_file(tmp_path, qwen2, uneven, [spec, SPECS[0]]))
    save = AdapterTrainer._save

    def interrupted(self: AdapterTrainer, *args: Any) -> None:
        _thread.interrupt_main()
        time.sleep(0.3)  # the main thread has noticed when the random state is written
        save(self, *args)

    monkeypatch.setattr(AdapterTrainer, "_save", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            JobRun(specs).run()
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    left = resumed(specs)
    assert left[0].options.resume
    JobRun(left[:1]).run()
    whole = solo(specs[0], tmp_path / "solo")
    for name, tensor in tensors(tmp_path / "out" / "lora").items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=TOLERANCE, msg=name)
