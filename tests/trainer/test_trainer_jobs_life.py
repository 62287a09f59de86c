"""Jobs that are interrupted, taken out, badly begun or stopped early; what a solo run's loop does for each."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from peftmux.trainer import OptionError, train
from peftmux.trainer.cli import main
from peftmux.trainer.host.host import Place
from peftmux.trainer.jobs.file import Changes, JobsFile, read_jobs, resumed
from peftmux.trainer.jobs.run import JobRun
from peftmux.trainer.jobs.together import Together, grouped
from peftmux.trainer.methods import AttachedAdapter
from peftmux.trainer.run import loop
from peftmux.trainer.run.base_model import load_base
from tests.trainer.method_runs import assert_equal, tensors
from tests.trainer.test_trainer_jobs import TOLERANCE, jobs_file
from tests.trainer.tiny_models import copy_task, write_rows

SAVING = {"save_strategy": "steps", "save_steps": 2}
SPECS: list[dict[str, Any]] = [
    {"name": "short", "method": "lora", "max_steps": 3, **SAVING},
    {"name": "long", "method": "dora", "max_steps": 9, "seed": 5, "gradient_accumulation_steps": 2, **SAVING},
    {"name": "epochs", "method": "prefix", "num_virtual_tokens": 2, "num_train_epochs": 3, **SAVING},
]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("few") / "rows.jsonl", copy_task(13))


class Cut(Together):
    """A lost machine in the middle of the run: every job has got as far as it has."""

    rounds = 0

    def round(self, jobs: Any) -> None:
        self.rounds += 1
        if self.rounds == 8:
            raise KeyboardInterrupt
        super().round(jobs)


def test_interrupted_jobs_go_on_and_end_with_the_same_bits(qwen2: Path, few: Path, tmp_path: Path):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    assert JobRun(read_jobs(jobs_file(tmp_path / "whole", qwen2, few, SPECS))).run().keys() == {
        spec["name"] for spec in SPECS
    }
    path = jobs_file(tmp_path / "cut", qwen2, few, SPECS)
    cut = JobRun(read_jobs(path), together=Cut)
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    assert cut.results.keys() == {"short"}
    assert {p.name for p in (tmp_path / "cut" / "out").iterdir()} == {
        "short",
        *(f"{s['name']}.checkpoints" for s in SPECS),
    }
    left = resumed(read_jobs(path))
    assert [(spec.name, spec.options.resume) for spec in left] == [("long", True), ("epochs", True)]
    again = JobRun(left)
    results = again.run()
    assert (results["long"].steps, results["epochs"].steps) == (9, 15)
    for spec in SPECS:
        whole, other = (tensors(tmp_path / run / "out" / spec["name"]) for run in ("whole", "cut"))
        for name, tensor in whole.items():  # who shares a pass decides the order of its sums
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=TOLERANCE, msg=name)
    assert resumed(read_jobs(path)) == []


def test_a_killed_run_of_jobs_leaves_whole_adapters_only(qwen2: Path, few: Path, tmp_path: Path):
    specs = [SPECS[0], {**SPECS[1], "max_steps": 100_000, "logging_steps": 1}]
    command = [sys.executable, "-m", "peftmux.trainer.cli", "--jobs", str(jobs_file(tmp_path, qwen2, few, specs))]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as run:
        assert run.stderr is not None
        deadline = time.monotonic() + 120
        while "long: step 7/" not in run.stderr.readline():
            assert run.poll() is None
            assert time.monotonic() < deadline
        run.send_signal(signal.SIGKILL)
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert files == {"short", "short.checkpoints", "long.checkpoints"}
    assert {p.name for p in (tmp_path / "out" / "short").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_a_job_taken_out_of_the_file_leaves(qwen2: Path, few: Path, tmp_path: Path):
    endless = {**SPECS[0], "name": "endless", "max_steps": 100_000, "save_strategy": "no"}
    file = JobsFile(jobs_file(tmp_path, qwen2, few, [endless, SPECS[1]]))
    asked = 0

    def changes() -> Changes:
        nonlocal asked
        asked += 1
        if asked == 3:
            jobs_file(tmp_path, qwen2, few, SPECS[1:2])
        return file.changes()

    run = JobRun(file.read(), changes)
    assert run.run().keys() == {"long"}
    assert "taken out after 3 of 100000 steps: no adapter written" in run.failed["endless"]
    assert not (tmp_path / "out" / "endless").exists()
    solo = train("dora", model=qwen2, data=few, out=tmp_path / "solo", training=dict(run.specs[1].training))
    for name, tensor in tensors(solo.out).items():
        torch.testing.assert_close(tensors(tmp_path / "out" / "long")[name], tensor, rtol=0, atol=TOLERANCE, msg=name)


def test_a_bad_job_that_joins_does_not_stop_the_others(qwen2: Path, few: Path, tmp_path: Path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n')
    bad = [{**SPECS[2], "name": "bad", "data": str(broken)}, {**SPECS[2], "name": "other", "dtype": "bfloat16"}]
    joining = read_jobs(jobs_file(tmp_path, qwen2, few, bad))
    changes = iter([Changes(joining)])
    run = JobRun(read_jobs(jobs_file(tmp_path, qwen2, few, SPECS[:1])), lambda: next(changes, Changes()))
    assert run.run().keys() == {"short"}
    assert "broken.jsonl:1: " in run.failed["bad"]
    assert "expected 'auto' for every job, other has 'bfloat16'" in run.failed["other"]


def test_nothing_of_a_job_that_cannot_begin_is_left_in_the_model(
    qwen2: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    """Wherever it was refused: by the shared pass, by a row its template does not fit, by an error nobody foresaw."""
    bad: list[dict[str, Any]] = [
        {"name": "packs", "method": "lora", "packing": True},
        {
            "name": "labels",
            "method": "lora",
            "task": "sequence",
            "data": str(tmp_path / "labelled.jsonl"),
            "bf16": True,
        },
        {"name": "far", "method": "p-tuning", "template": ["1@100"]},
        {"name": "odd", "method": "houlsby"},
    ]
    write_rows(tmp_path / "labelled.jsonl", [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(4)])

    def check_served(adapter: Any, *_: Any) -> None:
        if adapter.kind == "houlsby":
            raise ValueError("no such thing")

    monkeypatch.setattr(loop, "check_served", check_served)
    changes = iter([Changes(read_jobs(jobs_file(tmp_path, qwen2, few, bad)))])
    run = JobRun(read_jobs(jobs_file(tmp_path, qwen2, few, SPECS[:1])), lambda: next(changes, Changes()))
    model = run.run()["short"].model
    assert run.failed.keys() == {"packs", "labels", "far", "odd"}
    assert run.failed["odd"] == "ValueError: no such thing"
    assert "Traceback" in capsys.readouterr().err
    assert not [name for name, module in model.named_modules() if isinstance(module, Place | AttachedAdapter)]
    assert model.state_dict().keys() == load_base(run.specs[0].options, {})[0].state_dict().keys()


def test_a_watched_file_without_what_a_job_needs_is_said(qwen2: Path, few: Path, tmp_path: Path, capsys: Any):
    """An entry without data, as it looks while somebody writes it: the jobs that run go on."""
    path = jobs_file(tmp_path, qwen2, few, SPECS[:1])
    file = JobsFile(path)
    file.read()
    content = yaml.safe_load(path.read_text())
    content["jobs"][0]["data"] = content["defaults"].pop("data")
    path.write_text(yaml.safe_dump({**content, "jobs": [*content["jobs"], {"name": "b", "method": "ia3", "out": "b"}]}))
    assert file.changes() == Changes()
    assert "job 2 (b): options: the following arguments are required: --data\n" in capsys.readouterr().err


def test_the_last_job_of_a_watched_file_can_be_taken_out(qwen2: Path, few: Path, tmp_path: Path, capsys: Any):
    file = JobsFile(jobs_file(tmp_path, qwen2, few, SPECS[:1]))
    file.read()
    jobs_file(tmp_path, qwen2, few, [])
    assert file.changes() == Changes([], {"short"})
    (tmp_path / "jobs.yaml").write_text("defaults: {}\n")
    assert file.changes() == Changes()
    assert "jobs.yaml: expected `jobs`, a list" in capsys.readouterr().err
    with pytest.raises(OptionError, match="expected `jobs`, a list"):
        JobsFile(jobs_file(tmp_path, qwen2, few, [])).read()


def test_a_fusion_is_seen_to_be_done(qwen2: Path, few: Path, tmp_path: Path):
    """It has no files at the top of its folder."""
    members = [str(tmp_path / name) for name in ("m1", "m2")]
    for out in members:
        train("pfeiffer", model=qwen2, data=few, out=out, training={"max_steps": 1})
    fused = {"name": "fused", "method": "fusion", "adapters": members, "max_steps": 1}
    path = jobs_file(tmp_path, qwen2, few, [fused])
    assert [spec.name for spec in resumed(read_jobs(path))] == ["fused"]
    JobRun(read_jobs(path)).run()
    assert resumed(read_jobs(path)) == []


def test_a_job_that_overwrites_goes_on_and_is_done_once(qwen2: Path, few: Path, tmp_path: Path):
    """The adapter that it is to replace does not count for it, and its own does."""
    train("lora", model=qwen2, data=few, out=tmp_path / "out" / "long", training={"max_steps": 1})
    path = jobs_file(tmp_path, qwen2, few, SPECS[1:2], overwrite=True)
    before = tensors(tmp_path / "out" / "long").keys()
    with pytest.raises(KeyboardInterrupt):
        JobRun(read_jobs(path), together=Cut).run()
    left = resumed(read_jobs(path))
    assert [(spec.name, spec.options.resume) for spec in left] == [("long", True)]
    assert JobRun(left).run()["long"].steps == 9
    assert tensors(tmp_path / "out" / "long").keys() > before
    assert resumed(read_jobs(path)) == []
    shutil.rmtree(tmp_path / "out" / "long.checkpoints")
    assert resumed(read_jobs(path)) == []


def test_what_a_watched_file_says_of_jobs_that_run(qwen2: Path, few: Path, tmp_path: Path, capsys: Any):
    """One leaves and comes back under its name; one has other options now, which come too late for it."""
    long, short = {**SPECS[1], "save_strategy": "no"}, {**SPECS[0], "save_strategy": "no"}
    file = JobsFile(jobs_file(tmp_path, qwen2, few, [long, short]))
    edits = iter([[long], [long, {**short, "max_steps": 2}], [{**long, "seed": 6}, {**short, "max_steps": 2}]])

    def changes() -> Changes:
        edited = next(edits, None)
        if edited is not None:
            jobs_file(tmp_path, qwen2, few, edited)
        return file.changes()

    run = JobRun(file.read(), changes)
    results = run.run()
    said = capsys.readouterr().err
    assert "short: taken out after 1 of 3 steps" in said
    assert said.count("long: its options have changed: it goes on as it began") == 1
    assert (results["short"].steps, results["long"].steps, run.failed) == (2, 9, {})
    shares = [line.partition("places")[0].rpartition("(")[2] for line in said.splitlines() if "trainable" in line]
    assert len(shares) == 3
    card = (tmp_path / "out" / "short" / "README.md").read_text()
    assert card.count("23,968") == 1, "the base alone, whatever other jobs have in it"


def test_a_broken_job_does_not_stop_the_others(
    qwen2: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    specs = read_jobs(jobs_file(tmp_path, qwen2, few, [SPECS[0], {**SPECS[2], "num_train_epochs": 1}]))
    write = loop.finish

    def finish(ready: Any, metrics: Any) -> str:
        if ready.method.name == "lora":
            raise ValueError("no such thing")
        return write(ready, metrics)

    monkeypatch.setattr("peftmux.trainer.jobs.run.finish", finish)
    run = JobRun(specs)
    assert run.run().keys() == {"epochs"}
    assert run.failed == {"short": "ValueError: no such thing"}
    assert "Traceback" in capsys.readouterr().err


def test_a_diverging_job_changes_no_bit_of_the_others(qwen2: Path, few: Path, tmp_path: Path):
    found = []
    for name, rate in (("tame", 1e-3), ("wild", 1e30)):
        (tmp_path / name).mkdir()
        other = {**SPECS[0], "name": "other", "learning_rate": rate, "max_grad_norm": 0.0, "max_steps": 6}
        run = JobRun(read_jobs(jobs_file(tmp_path / name, qwen2, few, [other, SPECS[1], SPECS[2]])))
        run.run()
        assert [*run.failed] == (["other"] if name == "wild" else [])
        found.append({job: tensors(tmp_path / name / "out" / job) for job in ("long", "epochs")})
    for job in found[0]:
        assert_equal(found[0][job], found[1][job])


def test_a_run_killed_before_it_published_publishes_when_resumed(qwen2: Path, few: Path, tmp_path: Path):
    """What the dead run has left in the folder is no adapter's."""
    specs = [{**SPECS[0], "save_strategy": "no"}]
    JobRun(read_jobs(jobs_file(tmp_path, qwen2, few, specs))).run()
    served = tmp_path / "served"
    half = served / ".short.left" / "new"
    half.mkdir(parents=True)
    (half / "adapter_config.json").write_text("{")
    path = jobs_file(tmp_path, qwen2, few, specs, publish=str(served))
    assert resumed(read_jobs(path)) == []
    assert {p.name for p in served.iterdir()} == {".short.left", "short"}
    assert_equal(tensors(served / "short"), tensors(tmp_path / "out" / "short"))
    before = (served / "short").stat().st_ino
    assert resumed(read_jobs(path)) == []
    assert (served / "short").stat().st_ino == before, "it is there already"


def test_a_job_stops_early_and_keeps_its_best(qwen2: Path, few: Path, tmp_path: Path):
    held_out = write_rows(tmp_path / "eval.jsonl", copy_task(16, seed=1))
    early = {"eval_data": str(held_out), "early_stopping_patience": 2, "eval_strategy": "steps", "eval_steps": 2}
    # It stops after a few steps, before differences of rounding could decide when.
    wild = {"name": "wild", "method": "lora", "learning_rate": 1.0, "max_steps": 60, **early}
    specs = read_jobs(jobs_file(tmp_path, qwen2, few, [wild, {**SPECS[1], "save_strategy": "no"}]))
    result = JobRun(specs).run()["wild"]
    assert result.steps < 60
    solo = train(
        "lora",
        model=qwen2,
        data=few,
        eval_data=held_out,
        out=tmp_path / "solo",
        early_stopping_patience=2,
        training=dict(specs[0].training),
    )
    assert solo.steps == result.steps
    assert result.metrics["eval_loss"] == pytest.approx(solo.metrics["eval_loss"], abs=1e-4)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"wild", "long"}


def test_each_job_has_its_own_log(qwen2: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    specs = [{**SPECS[0], "report_to": ["tensorboard"]}, {"name": "plain", "method": "ia3", "max_steps": 2}]
    path = jobs_file(tmp_path, qwen2, few, specs, logging_steps=1)
    assert main(["--jobs", str(path)]) == 0
    shown = capsys.readouterr()
    assert "short: step 2/3 loss=" in shown.err
    assert "plain: step 2/2 loss=" in shown.err
    assert "short: 3 steps, loss" in shown.out
    assert [p.name for p in tmp_path.glob("out/*/runs")] == ["runs"]
    assert main(["--jobs", str(path), "--resume"]) == 0
    assert capsys.readouterr().err.count("done before") == 2


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True},
        {"bf16": True},
        {"dry_run": True},
        {"gradient_checkpointing": True},
        {"label_smoothing_factor": 0.1},
    ],
)
def test_what_a_job_cannot_have_is_refused(options: dict[str, Any], qwen2: Path, few: Path, tmp_path: Path):
    specs = read_jobs(jobs_file(tmp_path, qwen2, few, [{**SPECS[0], **options}]))
    with pytest.raises(OptionError, match=r"jobs: short: .*for a run of its own"):
        JobRun(specs).run()
    assert not (tmp_path / "out").exists()


def test_passes_hold_like_lengths_and_few_tokens():
    assert grouped([(1, 32)] * 8, 512) == [list(range(8))]
    assert grouped([(4, 128)] * 3, 512) == [[0], [1], [2]]
    assert grouped([(9, 128)], 512) == [[0]]
    assert grouped([(2, 10), (1, 200), (4, 12), (2, 190)], 600) == [[1, 3], [2, 0]]
