"""The command line: flags, the environment, the YAML file, and who wins."""

from __future__ import annotations

import json
from argparse import _StoreFalseAction
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from peftmux.trainer.cli import main
from peftmux.trainer.methods import METHODS
from peftmux.trainer.settings.config_file import file_arguments
from peftmux.trainer.settings.parser import build_parser

REQUIRED = ["--model", "m", "--data", "d", "--out", "o"]
LORA = {
    *("--r", "--lora-alpha", "--lora-dropout", "--target-modules", "--exclude-modules", "--layers-to-transform"),
    *("--layers-pattern", "--rank-pattern", "--alpha-pattern", "--use-rslora"),
}
BOTTLENECK = {
    *("--reduction-factor", "--non-linearity", "--scaling", "--leave-out", "--adapterdrop", "--drop-first"),
    *("--ln-before", "--ln-after"),
}
PROMPT = {"--num-virtual-tokens", "--prompt-init", "--prompt-init-text"}
PREFIX = {
    *("--num-virtual-tokens", "--prefix-init", "--prefix-init-text", "--prefix-init-from", "--prefix-projection"),
    "--encoder-hidden-size",
}
LORAMOE = {"--r", "--lora-alpha", "--num-experts", "--balance-weight", "--target-modules"}
METHOD_FLAGS = {
    "lora": LORA,
    "dora": LORA,
    "pissa": LORA,
    "rslora": LORA - {"--use-rslora"},
    "lora-plus": LORA | {"--loraplus-lr-ratio"},
    "adalora": {
        *("--init-r", "--target-r", "--lora-alpha", "--lora-dropout", "--orth-reg-weight", "--beta1", "--beta2"),
        *("--warmup-share", "--final-share", "--delta-t", "--target-modules", "--exclude-modules"),
    },
    "prefix": PREFIX,
    "p-tuning-v2": PREFIX,
    "prompt": PROMPT,
    "multitask-prompt": PROMPT | {"--tasks", "--num-ranks"},
    "p-tuning": PROMPT
    | {"--encoder-reparameterization-type", "--encoder-hidden-size", "--encoder-num-layers", "--encoder-dropout"}
    | {"--template"},
    "ia3": {"--target-modules", "--feedforward-modules", "--exclude-modules"},
    "ln": {"--target-modules"},
    "bitfit": {"--bias-terms"},
    "layers": {"--trained-layers", "--target-modules"},
    "shira": {"--r", "--mask", "--target-modules"},
    "diffpruning": {
        *("--sparsity", "--structured", "--l0-weight", "--alpha-init", "--alpha-learning-rate", "--final-share"),
        "--target-modules",
    },
    "ladder": {"--reduction-factor", "--layers", "--hidden-act", "--temperature", "--merge"},
    "vora": {
        *("--r", "--layers", "--target-modules", "--lora-dropout", "--patch-size", "--image-size"),
        *("--vision-embedding-intermediate-size", "--vision-attention-mask", "--image-mean", "--image-std"),
    },
    "head": set(),
    "loramoe": LORAMOE,
    "mixlora": LORAMOE | {"--top-k"},
    "houlsby": BOTTLENECK,
    "pfeiffer": BOTTLENECK,
    "parallel": BOTTLENECK,
    "fusion": {"--adapters", "--regularization"},
}
RUN_FLAGS = {
    *("--model", "--data", "--out", "--eval-data", "--task", "--labels", "--max-length", "--over-long"),
    *("--append-eos", "--dtype", "--quantization", "--attn-implementation", "--early-stopping-patience", "--resume"),
    *("--overwrite", "--dry-run", "--packing", "--pack-length", "--sweep", "--publish", "--ensemble"),
    *("--loss", "--beta", "--desirable-weight", "--undesirable-weight"),
}
TRAINING_FLAGS = {
    *("--max-steps", "--num-train-epochs", "--learning-rate", "--per-device-train-batch-size", "--seed"),
    *("--gradient-accumulation-steps", "--warmup-ratio", "--warmup-steps", "--lr-scheduler-type", "--save-strategy"),
    *("--weight-decay", "--logging-steps", "--bf16", "--gradient-checkpointing", "--report-to", "--eval-strategy"),
}


def parse(method: str, *words: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    parser = build_parser(method)
    argv = [*REQUIRED, *words]
    return vars(parser.parse_args([*file_arguments(parser, argv, env or {}), *argv]))


@pytest.mark.parametrize("method", METHODS)
def test_the_flags_of_each_method(method: str):
    parser = build_parser(method)
    groups = {group.title: {a.option_strings[0] for a in group._group_actions} for group in parser._action_groups}
    assert groups[method] == METHOD_FLAGS[method]
    assert groups["run"] == RUN_FLAGS
    assert set(parser._option_string_actions) > TRAINING_FLAGS | {"--config"}


def test_values_have_their_types_and_defaults_stay_unsaid():
    given = parse("lora", "--r", "4", "--lora-alpha", "2.5", "--max-steps", "7", "--learning-rate", "1e-3", "--bf16")
    assert given == {
        "model": "m",
        "data": "d",
        "out": "o",
        "r": 4,
        "lora_alpha": 2.5,
        "max_steps": 7,
        "learning_rate": 1e-3,
        "bf16": True,
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["q_proj"], ["q_proj"]),
        (["q_proj", "model.layers.0.mlp.up_proj"], ["q_proj", "model.layers.0.mlp.up_proj"]),
        (["all-linear"], "all-linear"),
        ([r".*\.(q|k)_proj"], r".*\.(q|k)_proj"),
    ],
)
def test_target_modules_are_names_or_one_pattern(words: list[str], expected: Any):
    assert parse("lora", "--target-modules", *words)["target_modules"] == expected


def test_patterns_are_json(capsys: pytest.CaptureFixture[str]):
    assert parse("lora", "--rank-pattern", '{"q_proj": 2}')["rank_pattern"] == {"q_proj": 2}
    with pytest.raises(SystemExit):
        parse("lora", "--rank-pattern", "q_proj")
    assert "expected a JSON object of str to int, got 'q_proj'" in capsys.readouterr().err


def test_the_file_holds_both_kinds_of_options(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "max-steps: 5\nlearning_rate: 0.001\nr: 2\ntarget_modules: [q_proj, v_proj]\nappend_eos: false\n"
        "rank_pattern: {q_proj: 3}\neval_data: null\nbf16: true\n"
    )
    given = parse("lora", "--config", str(file))
    assert (given["max_steps"], given["learning_rate"], given["r"]) == (5, 0.001, 2)
    assert (given["target_modules"], given["append_eos"]) == (["q_proj", "v_proj"], False)
    assert (given["rank_pattern"], given["bf16"]) == ({"q_proj": 3}, True)
    assert "eval_data" not in given


SWITCHED = [action.dest for action in build_parser("lora")._actions if isinstance(action, _StoreFalseAction)]


@pytest.mark.parametrize("name", SWITCHED)
def test_what_is_on_by_default_can_be_set_both_ways(name: str, tmp_path: Path):
    """transformers has a --no_x for each of these, beside --x."""
    for value in (True, False):
        file = tmp_path / "run.yaml"
        file.write_text(f"{name.replace('_', '-')}: {str(value).lower()}\n")
        assert parse("lora", "--config", str(file))[name] is value
        assert parse("lora", env={f"PEFTMUX_{name.upper()}": str(value)})[name] is value
    assert parse("lora", f"--no_{name}")[name] is False


def test_flags_win_over_the_environment_over_the_file(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("max_steps: 1\nseed: 1\nr: 1\n")
    env = {"PEFTMUX_SEED": "2", "PEFTMUX_R": "2", "PEFTMUX_AUTH_TOKENS": "of the server", "R": "9"}
    env["PEFTMUX_DEBUG"] = "1"  # for traces, no Trainer's option
    given = parse("lora", "--config", str(file), "--r", "3", env=env)
    assert (given["max_steps"], given["seed"], given["r"]) == (1, 2, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [("steps: 5", "no such option 'steps'"), ("- 1", "expected options by name, found list"), ("a: [", "expected")],
)
def test_a_bad_file_is_refused(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert main(["lora", *REQUIRED, "--config", str(file)]) == 1
    assert message in capsys.readouterr().err


def test_usage(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in (*METHODS, "qlora") if name not in shown] == []
    assert main([]) == 2
    assert main(["adalorra"]) == 2
    assert f"METHOD: expected one of {', '.join(METHODS)}, qlora; got 'adalorra'" in capsys.readouterr().err
    assert main(["lora", "--help"]) == 0
    assert "--rank-pattern JSON" in capsys.readouterr().out
    assert main(["lora", "--model", "m"]) == 2
    for words in (["--watch", "--jobs", "none.yaml"], ["--resume", "--jobs=none.yaml"]):
        assert main(words) == 1
        assert "none.yaml: No such file" in capsys.readouterr().err
    assert main(["lora", *REQUIRED, "--ranks", "4"]) == 2


@pytest.mark.parametrize("value", ["nan", "inf", "-1e-3", "fast"])
def test_a_learning_rate_is_a_finite_number(value: str, capsys: pytest.CaptureFixture[str]):
    assert main(["lora", *REQUIRED, f"--learning-rate={value}"]) == 2
    assert f"expected a finite number of 0 or more, got '{value}'" in capsys.readouterr().err


def test_the_learning_rate_that_is_taken_is_said(capsys: pytest.CaptureFixture[str]):
    main(["lora", "--help"])
    assert "default: 0.0007 at width 1024, 0.00035 at width 4096" in " ".join(capsys.readouterr().out.split())
    main(["prefix", "--help"])
    assert "Initial learning rate (default: 0.03)" in capsys.readouterr().out


def test_a_run_from_the_command_line(qwen2: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--model", str(qwen2), "--data", str(rows), "--out", str(tmp_path / "a"), "--max-steps", "2", "--r", "3"]
    assert main(["dora", *words, "--logging-steps", "1"]) == 0
    shown = capsys.readouterr()
    assert f"dora adapter after 2 steps: {tmp_path / 'a'}" in shown.out
    assert "step 1/2 loss=" in shown.err
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == 3
    assert main(["dora", *words]) == 1
    assert "is not empty; give --overwrite" in capsys.readouterr().err


def test_bad_data_ends_a_run_with_file_and_line(qwen2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = tmp_path / "d.jsonl"
    data.write_text('{"text": "a"}\n{"text": 1}\n')
    assert main(["lora", "--model", str(qwen2), "--data", str(data), "--out", str(tmp_path / "a")]) == 1
    assert capsys.readouterr().err == f"peftmux train: {data}:2: column 'text': expected a string, found a number\n"


def test_tensorboard_gets_the_log(qwen2: Path, rows: Path, tmp_path: Path):
    """Beside the adapter, as transformers lays it out; what makes the best adapter come back is not left there."""
    words = ["--model", str(qwen2), "--data", str(rows), "--logging-steps", "1", "--report-to", "tensorboard"]
    more = ["--learning-rate", "3e-3", "--eval-data", str(rows), "--eval-strategy", "steps", "--eval-steps", "2"]
    assert main(["lora", *words, *more, "--out", str(tmp_path / "a"), "--max-steps", "3"]) == 0
    (run,) = (tmp_path / "a.logs" / "runs").iterdir()
    log = EventAccumulator(str(run))
    log.Reload()
    losses = {event.step: event.value for event in log.Scalars("train/loss")}
    assert list(losses) == [1, 2, 3]
    assert [event.value for event in log.Scalars("train/learning_rate")] == pytest.approx([3e-3, 2e-3, 1e-3])
    assert {event.step for event in log.Scalars("eval/loss")} == {2, 3}
    card = (tmp_path / "a" / "README.md").read_text()
    (mean,) = (event.value for event in log.Scalars("train/train_loss"))
    assert mean == pytest.approx(sum(losses.values()) / 3, rel=1e-5)
    for name, value in (("train_loss", mean), ("eval_loss", log.Scalars("eval/loss")[-1].value)):
        assert float(card.partition(f"| {name} | ")[2].split()[0]) == pytest.approx(value, rel=1e-5), name
    stopping = ["--eval-data", str(rows), "--early-stopping-patience", "1", "--max-steps", "2", "--eval-steps", "1"]
    assert main(["lora", *words, "--out", str(tmp_path / "b"), *stopping, "--eval-strategy", "steps"]) == 0
    assert [path.name for path in (tmp_path / "b.checkpoints").iterdir()] == ["runs"]


def test_a_tracker_that_is_not_there_is_refused(
    qwen2: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = ["lora", "--model", str(qwen2), "--data", str(rows), "--out", str(tmp_path / "a"), "--report-to"]
    monkeypatch.setattr("peftmux.trainer.settings.arguments.get_available_reporting_integrations", list)
    assert main([*words, "tensorboard"]) == 1
    assert "report-to: tensorboard is not installed: pip install tensorboard" in capsys.readouterr().err
    assert main([*words, "tensorbored"]) == 1
    assert "got 'tensorbored'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
