"""How a run loads its base, and what tells one base from another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftmux.trainer import OptionError, train
from peftmux.trainer.jobs.file import job_spec
from peftmux.trainer.jobs.run import JobRun
from peftmux.trainer.run import base_identity as identity
from peftmux.trainer.run import base_model, loop
from peftmux.trainer.run.base_identity import base_identity
from peftmux.trainer.settings.options import RunOptions
from tests.trainer.tiny_models import save_base

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def no_weights(*_: Any, **__: Any) -> None:
    pytest.fail("the weights are read")


def options(base: Path, **given: Any) -> RunOptions:
    return RunOptions(model=str(base), data="rows", out="a", **given)


@pytest.mark.parametrize("shape", ["llama", "qwen2", "gemma3"])
def test_a_base_without_a_tokenizer_is_told_before_its_weights_are_read(
    shape: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Of Qwen's and Gemma's kind transformers makes a tokenizer of special tokens alone."""
    base = save_base(tmp_path / "base", shape)
    for name in TOKENIZER:
        (base / name).unlink()
    monkeypatch.setattr(base_model, "load_checkpoint", no_weights)
    with pytest.raises(OptionError, match=r"model: .* cannot be loaded as a causal LM with its tokenizer: "):
        base_model.load_base(options(base), {})


def test_no_end_of_sequence_is_told_before_the_weights_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    base = save_base(tmp_path / "base", "llama")
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    monkeypatch.setattr(base_model, "load_checkpoint", no_weights)
    with pytest.raises(OptionError, match="append-eos: the tokenizer has no end-of-sequence token"):
        base_model.load_base(options(base), {})


class Stop(Exception):
    """Where the model is when a run begins to look at it."""


def stop(model: Any, reserved: int) -> int:
    raise Stop(model.device.type)


def test_what_comes_before_the_first_step_is_computed_where_the_steps_are(
    qwen2: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    asked: list[Any] = []

    def meta(training: Any) -> torch.device:
        asked.append(training)
        return torch.device("meta")

    monkeypatch.setattr(base_model, "training_device", meta)
    monkeypatch.setattr(loop, "longest_row", stop)
    run: dict[str, Any] = {"model": str(qwen2), "data": str(rows), "max_steps": 1}
    with pytest.raises(Stop, match="meta"):
        train("lora", **run, out=tmp_path / "a")
    with pytest.raises(Stop, match="meta"):
        JobRun([job_spec("a", "lora", {**run, "out": str(tmp_path / "b")}, "here")]).run()
    assert [training["max_steps"] for training in asked] == [1, 1]


@pytest.mark.parametrize(
    ("training", "environment", "device"),
    [
        ({}, {}, "cuda:0"),
        ({"use_cpu": False, "fsdp": ""}, {"LOCAL_RANK": "1", "ACCELERATE_USE_FSDP": "false"}, "cuda:1"),
        ({}, {"LOCAL_RANK": "3"}, "cuda:1"),
        ({}, {"LOCAL_RANK": "-1"}, "cuda:0"),
        ({"use_cpu": True}, {}, None),
        ({}, {"ACCELERATE_USE_CPU": "True"}, None),
        ({"fsdp": "full_shard"}, {"LOCAL_RANK": "1"}, None),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, {}, None),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, None),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, None),
    ],
)
def test_the_device_is_the_trainers(
    training: dict[str, Any], environment: dict[str, str], device: str | None, monkeypatch: pytest.MonkeyPatch
):
    for name in ("LOCAL_RANK", "ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    assert base_model.training_device(training) == (None if device is None else torch.device(device))
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert base_model.training_device(training) is None


def test_what_no_model_is_made_of_is_no_part_of_its_identity(tmp_path: Path):
    base, moved = save_base(tmp_path / "base", "qwen2"), tmp_path / "moved"
    before = base_identity(str(base))
    shutil.copytree(base, moved)
    for name in ("generation_config.json", "preprocessor_config.json", "vocab.json", "trainer_state.json"):
        (moved / name).write_text(json.dumps({"new": name}))
    (moved / "pytorch_model.bin").write_bytes(b"not read where there are safetensors")
    (moved / "consolidated.safetensors").write_bytes(b"nor this")
    (moved / "README.md").write_text("a base")
    assert base_identity(str(moved)) == before


@pytest.mark.parametrize("name", ["config.json", *TOKENIZER, "special_tokens_map.json"])
def test_what_a_model_is_made_of_is_its_identity(name: str, tmp_path: Path):
    base = save_base(tmp_path / "base", "qwen2")
    before = base_identity(str(base))
    file = base / name
    file.write_text(file.read_text() + " " if file.exists() else "{}")
    assert before != base_identity(str(base))


@pytest.mark.parametrize(
    "names",
    [
        ("model.safetensors",),
        ("model-00001-of-00001.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "vocab.txt"),
        ("other.safetensors", "tokenizer.model"),
    ],
)
def test_weights_and_vocabularies_of_every_name_are_its_identity(names: tuple[str, ...], tmp_path: Path):
    for name in ("config.json", *names):
        (tmp_path / name).write_bytes(b"{}")
    found = {base_identity(str(tmp_path))}
    for name in names:
        (tmp_path / name).write_bytes(b"[]")
        found.add(base_identity(str(tmp_path)))
    assert len(found) == 1 + len(names)


def test_one_bases_weights_are_read_once_until_they_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    base = save_base(tmp_path / "base", "qwen2")
    weights = base / "model.safetensors"
    reads: list[Path] = []
    samples = identity._samples

    def counted(path: Path) -> bytes:
        reads.append(path)
        return samples(path)

    monkeypatch.setattr(identity, "_samples", counted)
    first = {base_identity(str(base)) for _ in range(3)}
    assert (len(first), len(reads)) == (1, 1)
    save_file({name: t + 0.01 for name, t in load_file(weights).items()}, weights, {"format": "pt"})
    assert base_identity(str(base)) not in first
    assert len(reads) == 2
