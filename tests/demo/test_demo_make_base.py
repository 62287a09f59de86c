"""The script that makes the base runs end to end and gives equal bytes for equal seeds."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from peftmux.demo import BASE, SMALL, make_base


@pytest.fixture
def one_thread() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_runs_and_is_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: object) -> None:
    monkeypatch.setattr(make_base, "TOKENIZER_DOCUMENTS", 300)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert make_base.main(["--out", str(tmp_path / name), "--steps", "2", "--seed", str(seed)]) == 0
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(digests(tmp_path / "a"))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a")["model.safetensors"] != digests(tmp_path / "c")["model.safetensors"]


def test_tokenizer_of_the_repository_is_the_checked_in_one(tmp_path: Path) -> None:
    """The base on disk was made from the text as it is generated now."""
    make_base.make_tokenizer(seed=0).save_pretrained(tmp_path)
    made = (tmp_path / "tokenizer.json").read_text()
    assert made == (BASE / "tokenizer.json").read_text() == (SMALL / "tokenizer.json").read_text()


def test_sizes_are_those_on_disk() -> None:
    for name, size in make_base.SIZES.items():
        kept = AutoConfig.from_pretrained(size.out)
        made = make_base.config(kept.vocab_size, kept.eos_token_id, kept.pad_token_id, size)
        same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        assert all(getattr(kept, field) == getattr(made, field) for field in same), name


def test_learning_rate_warms_up_and_falls() -> None:
    rates = [make_base.rate(step, 1000) for step in range(1000)]
    assert rates[0] < rates[50] < rates[99] == max(rates)
    assert rates[999] < 0.03 * max(rates)
