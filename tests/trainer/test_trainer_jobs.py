"""Many jobs in one batch: each ends as its solo run does; they join, leave, are swept and published."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from peftmux.adapters.aside import folder_aside
from peftmux.adapters.files import read_adapter
from peftmux.trainer import OptionError, train
from peftmux.trainer.cli import main
from peftmux.trainer.errors import DataError
from peftmux.trainer.jobs.file import JobsFile, read_jobs, split_options
from peftmux.trainer.jobs.run import JobRun
from peftmux.trainer.jobs.sweep import run_sweep
from peftmux.trainer.methods import METHODS
from peftmux.trainer.run import data_files
from tests.trainer.method_runs import assert_equal, tensors
from tests.trainer.tiny_models import copy_task, write_rows

TOLERANCE = 5e-5
"""float32: sums in another order, seen through Adam, which divides a gradient by its own size. Steps are up to 1e-2."""
SPECS: list[dict[str, Any]] = [
    {"name": "lora", "method": "lora", "r": 4, "learning_rate": 1e-2, "max_steps": 7},
    {"name": "dora", "method": "dora", "r": 2, "max_steps": 5, "gradient_accumulation_steps": 2},
    {"name": "prefix", "method": "prefix", "num_virtual_tokens": 3, "max_steps": 6, "seed": 3},
    {"name": "longer", "method": "prefix", "num_virtual_tokens": 6, "max_steps": 3},
    {"name": "prompt", "method": "prompt", "num_virtual_tokens": 4, "max_steps": 6, "lr_scheduler_type": "cosine"},
    {"name": "encoder", "method": "p-tuning", "num_virtual_tokens": 2, "max_steps": 4},
    {"name": "budget", "method": "adalora", "init_r": 3, "target_r": 2, "max_steps": 9},
    {"name": "vectors", "method": "ia3", "max_steps": 4, "weight_decay": 0.1},
    {"name": "norms", "method": "ln", "max_steps": 4},
    {"name": "entries", "method": "shira", "r": 1, "max_steps": 4},
    {"name": "biases", "method": "bitfit", "max_steps": 4, "learning_rate": 1e-2},
    {"name": "whole", "method": "layers", "max_steps": 4},
    {"name": "difference", "method": "diffpruning", "sparsity": 0.1, "max_steps": 6},
    {"name": "beside", "method": "ladder", "max_steps": 5},
    {"name": "after", "method": "houlsby", "max_steps": 5, "adapterdrop": 1},
    {"name": "parallel", "method": "parallel", "max_steps": 4},
    {"name": "weighed", "method": "loramoe", "max_steps": 4},
    {"name": "chosen", "method": "mixlora", "max_steps": 4, "learning_rate": 1e-3},
    {"name": "projected", "method": "prefix", "prefix_projection": True, "num_virtual_tokens": 2, "max_steps": 4},
    {"name": "template", "method": "p-tuning", "template": ["2@0", "1@-1"], "max_steps": 4},
    {"name": "directions", "method": "pissa", "r": 2, "num_train_epochs": 2},
]


def jobs_file(folder: Path, base: Path, rows: Path, specs: list[dict[str, Any]], **defaults: Any) -> Path:
    common = {"model": str(base), "data": str(rows), "per_device_train_batch_size": 3, "disable_tqdm": True}
    jobs = [{"out": str(folder / "out" / spec["name"]), **spec} for spec in specs]
    path = folder / "jobs.yaml"
    path.write_text(yaml.safe_dump({"defaults": {**common, **defaults}, "jobs": jobs}))
    return path


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("few") / "rows.jsonl", copy_task(13))


def test_each_job_ends_as_its_solo_run_does(qwen2: Path, few: Path, tmp_path: Path):
    specs = read_jobs(jobs_file(tmp_path, qwen2, few, SPECS))
    results = JobRun(specs).run()
    assert list(results) != [spec["name"] for spec in SPECS], "they end when they are done, not in order"
    for spec in specs:
        solo = train(
            spec.method.name,
            model=qwen2,
            data=few,
            out=tmp_path / "solo" / spec.name,
            config={
                k: v for k, v in SPECS[specs.index(spec)].items() if k in spec.method.config_class.__dataclass_fields__
            },
            training=spec.training,
        )
        together, alone = tensors(tmp_path / "out" / spec.name), tensors(tmp_path / "solo" / spec.name)
        assert together.keys() == alone.keys()
        for name, tensor in alone.items():
            assert together[name].shape == tensor.shape
            apart = (together[name].float() - tensor.float()).abs().flatten().tolist()
            assert max(apart, default=0.0) <= TOLERANCE, (spec.name, name)
        assert results[spec.name].steps == solo.steps
        config = [
            json.loads((tmp_path / where / spec.name / "adapter_config.json").read_text()) for where in ("out", "solo")
        ]
        assert config[0] == config[1]


def test_jobs_join_while_others_run(qwen2: Path, few: Path, tmp_path: Path):
    path = jobs_file(tmp_path, qwen2, few, SPECS[:1])
    file = JobsFile(path)
    asked = 0

    def more() -> Any:
        nonlocal asked
        asked += 1
        if asked == 2:
            jobs_file(tmp_path, qwen2, few, SPECS[:2])
        return file.changes()

    results = JobRun(file.read(), more).run()
    assert results.keys() == {"lora", "dora"}
    assert results["dora"].steps == 5


def test_one_that_diverges_does_not_stop_the_others(qwen2: Path, few: Path, tmp_path: Path):
    wild = {"name": "wild", "method": "lora", "learning_rate": 1e30, "max_grad_norm": 0.0, "max_steps": 4}
    run = JobRun(read_jobs(jobs_file(tmp_path, qwen2, few, [wild, SPECS[0]])))
    assert run.run().keys() == {"lora"}
    assert "diverged" in run.failed["wild"]
    assert not (tmp_path / "out" / "wild").exists()


BAD: dict[str, tuple[Any, str]] = {
    "an option": ([{"name": "a", "method": "lora", "rank": 4}], r"job 1 \(a\).*no such option 'rank'"),
    "a value": ([{"name": "a", "method": "lora", "r": 0}], r"job 1 \(a\): r: expected 1 or more"),
    "a type": ([{"name": "a", "method": "lora", "r": "four"}], r"job 1 \(a\): r.*invalid int"),
    "no value": (
        [{"name": "a", "method": "lora", "target_modules": []}],
        r"job 1 \(a\): target-modules: expected at le",
    ),
    "values of one": (
        [{"name": "a", "method": "lora", "r": [1, 2]}],
        r"job 1 \(a\): r: expected one value, got \[1, 2\]",
    ),
    "a flag for a value": (
        [{"name": "a", "method": "lora", "target_modules": ["q_proj", "--help"]}],
        r"job 1 \(a\): target-modules: expected values that do not begin with a dash, got '--help'",
    ),
    "a method": ([{"name": "a", "method": "loro"}], r"job 1 \(a\): method: expected one of"),
    "no name": ([{"method": "lora"}], "job 1: expected a name"),
    "a sweep": ([{"name": "a", "method": "lora", "sweep": "r=1,2"}], r"job 1 \(a\): sweep: trains several"),
    "an ensemble": ([{"name": "a", "method": "lora", "ensemble": 2}], r"job 1 \(a\): ensemble: trains several"),
    "a name twice": ([{"name": "a", "method": "lora", "out": "x"}, {"name": "a", "method": "lora"}], "each name once"),
    "a folder twice": (
        [{"name": "a", "method": "lora", "out": "x"}, {"name": "b", "method": "ln", "out": "x"}],
        "expected its own out",
    ),
    "one folder of checkpoints": (
        [{"name": n, "method": "ln", "output_dir": "ck"} for n in ("a", "b")],
        r"job 2: expected its own output_dir, got 'ck' twice",
    ),
    "a folder spelled in two ways": (
        [{"name": "a", "method": "lora", "out": "x"}, {"name": "b", "method": "ln", "out": "y/../x"}],
        r"job 2: expected its own out, got '/.*/x' twice",
    ),
    "another's checkpoints": (
        [{"name": "a", "method": "lora", "out": "x"}, {"name": "b", "method": "ln", "out": "x.checkpoints"}],
        r"job 2: expected its own out",
    ),
    "one published name": (
        [{"name": n, "method": "ln", "out": f"{n}/x", "publish": "p"} for n in ("a", "b")],
        r"job 2: expected its own publish, got 'p/x' twice",
    ),
    "a name that leads elsewhere": ([{"name": "../a", "method": "lora"}], "expected a name that can be a folder's"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused(case: str, qwen2: Path, few: Path, tmp_path: Path):
    specs, message = BAD[case]
    path = tmp_path / "jobs.yaml"
    jobs = [{"out": str(tmp_path / f"o{i}"), **spec} for i, spec in enumerate(specs)]
    path.write_text(yaml.safe_dump({"defaults": {"model": str(qwen2), "data": str(few)}, "jobs": jobs}))
    with pytest.raises(OptionError, match=message):
        read_jobs(path)


LINES: dict[str, tuple[bytes, str]] = {
    "an option": (
        b"defaults: {data: d, model: m}\njobs:\n- {name: a, method: ln, out: o}\n- name: b\n  method: ln\n  rank: 4\n",
        r"jobs\.yaml:4: job 2 \(b\): .*'rank'",
    ),
    "a key twice": (
        b"jobs:\n- name: a\n  max-steps: 3\n  max_steps: 4\n",
        r"jobs\.yaml:4: key 'max_steps' is there twice",
    ),
    "no YAML": (b"jobs:\n- {name: a\n- b: [\n", r"jobs\.yaml:3: expected YAML"),
    "no data": (
        b"jobs:\n- {name: a, method: ln, out: o, model: m}\n",
        r"jobs\.yaml:2: job 1 \(a\): options: the following arguments are required: --data\n",
    ),
    "no JSON": (
        b"jobs:\n- {name: a, method: lora, out: o, model: m, data: d, rank_pattern: {q: 2020-01-01}}\n",
        r"jobs\.yaml:2: job 1 \(a\): rank-pattern: expected a JSON object: .*date",
    ),
    "no UTF-8": (b"jobs:\n- name: caf\xe9\n", r"jobs\.yaml:2: expected UTF-8 text"),
    "an empty list": (b"jobs: []\n", r"jobs\.yaml: expected `jobs`, a list"),
    "nothing": (b"", r"jobs\.yaml: expected `jobs`, a list"),
    "no list": (b"jobs: lora\n", r"jobs\.yaml: expected `jobs`, a list"),
    "no options": (b"jobs:\n- lora\n", r"jobs\.yaml:2: job 1: expected options by name, found str"),
    "no defaults": (b"defaults: 3\njobs:\n- {name: a}\n", r"jobs\.yaml: defaults: expected options by name, found int"),
}


@pytest.mark.parametrize("case", LINES)
def test_bad_files_are_refused_by_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    content, message = LINES[case]
    (tmp_path / "jobs.yaml").write_bytes(content)
    assert main(["--jobs", str(tmp_path / "jobs.yaml")]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert main(["--jobs", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml: No such file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["jobs.yaml"]


def test_bad_data_of_one_job_is_named_before_any_step(qwen2: Path, few: Path, tmp_path: Path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    path = jobs_file(tmp_path, qwen2, few, [SPECS[0], {**SPECS[1], "data": str(broken)}])
    with pytest.raises(OptionError, match=r"dora: .*broken\.jsonl:2"):
        JobRun(read_jobs(path)).run()
    assert not (tmp_path / "out").exists()


def test_a_sweep_keeps_the_best(taught: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    held_out = write_rows(tmp_path / "eval.jsonl", copy_task(32, seed=1))
    words = ["lora", "--model", str(taught), "--data", str(rows), "--eval-data", str(held_out), "--max-steps", "30"]
    (tmp_path / "p").mkdir()
    words += ["--out", str(tmp_path / "a"), "--sweep", "learning_rate=1e-9,2e-3,1e-8", "--publish", str(tmp_path / "p")]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "best: learning_rate=2e-3" in shown
    assert shown.count("<- kept") == 1
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == files
    assert {path.name for path in (tmp_path / "p" / "a").iterdir()} == files
    assert {path.name for path in tmp_path.iterdir()} == {"a", "p", "eval.jsonl"}, "nothing else is left"


def test_a_sweep_chooses_as_solo_runs_would(qwen2: Path, few: Path, tmp_path: Path, capsys: Any):
    """A value that diverges is said, and lost; what stood in the folder and is no adapter's stays."""
    held_out, out = write_rows(tmp_path / "eval.jsonl", copy_task(16, seed=1)), tmp_path / "a"
    words = ["lora", "--model", str(qwen2), "--data", str(few), "--eval-data", str(held_out), "--max-steps", "6"]
    words += ["--max-grad-norm", "0", "--lora-dropout", "0.1"]
    losses = {}
    for rate in ("1e-4", "1e-2", "3e-1"):
        training = {"max_steps": 6, "max_grad_norm": 0.0, "learning_rate": float(rate), "disable_tqdm": True}
        solo = train(
            "lora", model=qwen2, data=few, eval_data=held_out, out=tmp_path / rate, training=training,
            config={"lora_dropout": 0.1},
        )  # fmt: skip
        losses[rate] = solo.metrics["eval_loss"]
    best = min(losses, key=losses.__getitem__)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    words += ["--out", str(out), "--overwrite"]
    assert main([*words, "--sweep", "learning_rate=1e-4,1e-2,3e-1,1e30"]) == 0
    shown = capsys.readouterr().out
    assert f"best: learning_rate={best}" in shown
    assert re.search("1e30 the run diverged", shown)
    for rate, loss in losses.items():
        (row,) = re.findall(rf"^ *{rate} .*", shown, re.MULTILINE)
        assert float(row.split()[3]) == pytest.approx(loss, abs=1e-3), rate
    assert (out / "notes.txt").read_text() == "mine"
    kept, alone = tensors(out), tensors(tmp_path / best)
    for name, tensor in alone.items():
        torch.testing.assert_close(kept[name], tensor, rtol=0, atol=TOLERANCE, msg=name)
    assert main([*words, "--sweep", "learning_rate=1e30,1e29"]) == 1
    assert "no value is left: learning_rate=1e30: the run diverged" in capsys.readouterr().err
    assert_equal(tensors(out), kept)


def test_what_a_sweep_returns_is_there(qwen2: Path, few: Path, tmp_path: Path):
    given = {"model": str(qwen2), "data": str(few), "eval_data": str(few), "out": str(tmp_path / "a"), "max_steps": 2}
    result = run_sweep(split_options("lora", METHODS["lora"], {**given, "sweep": "r=2,3"}), given)
    assert result.kept.out == tmp_path / "a"
    assert json.loads((result.kept.out / "adapter_config.json").read_text())["r"] == int(result.best)
    assert read_adapter(result.kept.out).digest == result.kept.digest
    assert [(value, run.steps) for value, run in result.runs.items()] == [("2", 2), ("3", 2)]
    assert result.runs["3"].parameters * 2 == result.runs["2"].parameters * 3


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("r=4", "different values"),
        ("r", "NAME=V1"),
        ("r=4,4", "different values"),
        ("r=4,04", "expected different values, got 4 and 04"),
        ("rank=4,8", "no such option"),
        ("output-dir=a,b", "output-dir is the same for all"),
        ("ensemble=2,3", "ensemble is the same for all"),
        ("target_modules=[q_proj,[o_proj]", "NAME=V1"),
    ],
)
def test_bad_sweeps_are_refused(sweep: str, message: str, qwen2: Path, few: Path, tmp_path: Path, capsys: Any):
    words = ["lora", "--model", str(qwen2), "--data", str(few), "--eval-data", str(few), "--out", str(tmp_path / "a")]
    assert main([*words, "--sweep", sweep]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_sweep_over_lists_and_objects_keeps_its_logs(qwen2: Path, few: Path, tmp_path: Path, capsys: Any):
    words = ["lora", "--model", str(qwen2), "--data", str(few), "--eval-data", str(few), "--max-steps", "2"]
    words += ["--out", str(tmp_path / "a"), "--overwrite", "--report-to", "tensorboard"]
    assert main([*words, "--sweep", "target_modules=[q_proj, v_proj],[o_proj]"]) == 0
    assert "[o_proj]" in capsys.readouterr().out
    assert main([*words, "--sweep", 'rank_pattern={"q_proj": 2},{"q_proj": 4, "o_proj": 3}']) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a", "a.logs"}
    assert {path.name for path in (tmp_path / "a.logs").iterdir()} == {"0", "1"}
    assert all(list(logs.rglob("events.out.*")) for logs in (tmp_path / "a.logs").iterdir())


@pytest.mark.parametrize("several", [["--sweep", "learning_rate=1e-3,1e30"], ["--ensemble", "2"]])
def test_early_stopping_leaves_only_the_checkpoints_that_were_asked_for(
    several: list[str], qwen2: Path, few: Path, tmp_path: Path, capsys: Any
):
    """As a single run: also of a value that diverges, which leaves none to go on from."""
    words = ["lora", "--model", str(qwen2), "--data", str(few), "--eval-data", str(few), "--max-steps", "2"]
    words += ["--early-stopping-patience", "1", "--eval-strategy", "steps", "--eval-steps", "1", "--overwrite"]
    words += ["--report-to", "tensorboard", "--max-grad-norm", "0", *several]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a", "a.logs"}
    assert {path.name for path in (tmp_path / "a.logs").glob("*/*")} == {"runs"}
    assert all(list((tmp_path / "a.logs" / i).rglob("events.out.*")) for i in "01")
    assert main([*words, "--out", str(tmp_path / "b"), "--save-strategy", "steps", "--save-steps", "1"]) == 0
    assert list((tmp_path / "b.checkpoints").glob("0/checkpoint-*"))


def test_nothing_of_two_runs_that_write_to_one_folder_is_lost(qwen2: Path, few: Path, tmp_path: Path, capsys: Any):
    """The one that comes second is refused while the other is under way."""
    words = ["lora", "--model", str(qwen2), "--data", str(few), "--eval-data", str(few), "--max-steps", "1"]
    words += ["--out", str(tmp_path / "a"), "--overwrite"]
    with folder_aside(tmp_path / "a"):
        for several in (["--sweep", "r=2,4"], ["--ensemble", "2"], []):
            assert main([*words, *several]) == 1
            assert "another run is writing to" in capsys.readouterr().err
    assert main([*words, "--sweep", "r=2,4"]) == 0


def test_one_checkpoint_folder_given_to_many_is_one_for_each(qwen2: Path, few: Path, tmp_path: Path, capsys: Any):
    """Also where a value is a path. Early stopping comes back to a checkpoint, which must be the value's own."""
    words = [
        "lora",
        "--model",
        str(qwen2),
        "--data",
        str(few),
        "--eval-data",
        str(few),
        "--early-stopping-patience",
        "1",
    ]
    words += ["--max-steps", "6", "--eval-steps", "2", "--output-dir", str(tmp_path / "ck"), "--disable-tqdm", "true"]
    other = write_rows(tmp_path / "other.jsonl", copy_task(8, seed=3))
    words += ["--learning-rate", "3e-2", "--out", str(tmp_path / "a")]
    assert main([*words, "--sweep", f"data={few},{other}"]) == 0
    table = capsys.readouterr().out
    assert "No such file" not in table
    assert len([line for line in table.splitlines() if str(tmp_path / "other.jsonl") in line.split()]) == 1
    assert {path.name for path in (tmp_path / "ck").iterdir()} == {"0", "1"}
    assert main([*words, "--overwrite", "--ensemble", "2", "--out", str(tmp_path / "b")]) == 0
    specs = [{**SPECS[0], "name": name, "out": str(tmp_path / name)} for name in ("c", "d")]
    for option in ("output_dir", "output-dir"):
        jobs = read_jobs(jobs_file(tmp_path, qwen2, few, specs, **{option: str(tmp_path / "ck")}))
        assert [job.training["output_dir"] for job in jobs] == [str(tmp_path / "ck" / name) for name in ("c", "d")]
    specs[0]["output-dir"] = "own"
    jobs = read_jobs(jobs_file(tmp_path, qwen2, few, specs, output_dir="ck"))
    assert [job.training["output_dir"] for job in jobs] == ["own", "ck/d"]


def test_an_ensemble_is_its_members_solo_runs(qwen2: Path, few: Path, tmp_path: Path, capsys: Any):
    words = ["prompt", "--model", str(qwen2), "--data", str(few), "--max-steps", "4", "--num-virtual-tokens", "3"]
    words += ["--prompt-init", "vocabulary", "--disable-tqdm", "true"]
    published = tmp_path / "p"
    published.mkdir()
    assert (
        main([*words, "--ensemble", "3", "--seed", "7", "--out", str(tmp_path / "a"), "--publish", str(published)]) == 0
    )
    said = capsys.readouterr().out
    assert "ensemble of 3" in said
    assert "take the answer that most give" in said
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"0", "1", "2"}
    assert {path.name for path in published.iterdir()} == {"a-0", "a-1", "a-2"}
    members = [tensors(tmp_path / "a" / str(i))["adapter_model.safetensors/prompt_embeddings"] for i in range(3)]
    assert (members[0] - members[1]).abs().max() > 0.01
    assert main([*words, "--seed", "8", "--out", str(tmp_path / "solo")]) == 0
    alone = tensors(tmp_path / "solo")["adapter_model.safetensors/prompt_embeddings"]
    torch.testing.assert_close(members[1], alone, rtol=0, atol=TOLERANCE)
    assert main([*words, "--ensemble", "2", "--out", str(tmp_path / "a")]) == 1
    assert main([*words, "--ensemble", "2", "--overwrite", "--out", str(tmp_path / "solo")]) == 1
    assert "expected nothing or an older ensemble" in capsys.readouterr().err
    assert main([*words, "--ensemble", "2", "--overwrite", "--out", str(tmp_path / "a")]) == 0
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"0", "1"}
    assert {path.name for path in tmp_path.iterdir()} == {"a", "p", "solo"}
    (published / "b-1").write_text("a user's own")
    onto = ["--ensemble", "2", "--out", str(tmp_path / "b"), "--publish", str(published)]
    assert main([*words, *onto]) == 1
    assert "b-1, found a file" in capsys.readouterr().err
    assert main([*words, "--ensemble", "0", "--out", str(tmp_path / "b")]) == 1
    assert main([*words, "--ensemble", "2", "--sweep", "seed=1,2", "--out", str(tmp_path / "b")]) == 1
    assert "not with --sweep" in capsys.readouterr().err


def test_an_ensemble_is_whole_or_nothing(qwen2: Path, few: Path, tmp_path: Path, capsys: Any):
    words = ["lora", "--model", str(qwen2), "--data", str(few), "--max-steps", "4", "--out", str(tmp_path / "a")]
    assert main([*words, "--learning-rate", "1e30", "--max-grad-norm", "0", "--ensemble", "2"]) == 1
    assert "member 0: the run diverged" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_packing_is_the_same_training_with_less_padding(qwen2: Path, tmp_path: Path):
    """One pack that holds all rows, against one padded batch of all rows."""
    data = write_rows(tmp_path / "rows.jsonl", copy_task(9))
    training = {"max_steps": 3, "per_device_train_batch_size": 9, "learning_rate": 1e-2, "disable_tqdm": True}
    found = []
    for packing in (False, True):
        out = tmp_path / f"packed-{packing}"
        train("lora", model=qwen2, data=data, out=out, training=training, packing=packing)
        found.append(load_file(out / "adapter_model.safetensors"))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=TOLERANCE, msg=name)


def test_packing_is_refused_where_it_is_not_exact(qwen2: Path, few: Path, tmp_path: Path):
    with pytest.raises(OptionError, match="prefix puts something in front of each row"):
        train("prefix", model=qwen2, data=few, out=tmp_path / "a", packing=True, training={"max_steps": 1})


def test_data_errors_keep_their_type(qwen2: Path, tmp_path: Path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        train("lora", model=qwen2, data=empty, out=tmp_path / "a", training={"max_steps": 1})


def test_a_file_is_read_and_tokenised_once_for_all(
    qwen2: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: Counter[str] = Counter()

    def counted(own: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[own.__name__] += 1
            return own(*args, **kwargs)

        return call

    for name in ("read_rows", "encode_rows", "file_digest"):
        monkeypatch.setattr(data_files, name, counted(getattr(data_files, name)))
    held_out = write_rows(tmp_path / "eval.jsonl", copy_task(4, seed=1))
    words = ["lora", "--model", str(qwen2), "--data", str(few), "--eval-data", str(held_out), "--max-steps", "1"]
    words += ["--disable-tqdm", "true", "--over-long", "truncate"]
    assert main([*words, "--max-length", "auto", "--sweep", "r=2,3,4", "--out", str(tmp_path / "a")]) == 0
    assert calls == {"read_rows": 2, "encode_rows": 2, "file_digest": 2}
    calls.clear()
    assert main([*words, "--sweep", "max_length=5,6", "--out", str(tmp_path / "b")]) == 0
    assert calls == {"read_rows": 2, "encode_rows": 4, "file_digest": 2}, "each length is another set of rows"
