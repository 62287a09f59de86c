"""Ladder side-tuning: values and gradients of the paper's formula in plain torch, with the base only read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peftmux.adapters.lower import load_adapter
from peftmux.adapters.torch_base import TorchBase
from peftmux.trainer import OptionError, train
from peftmux.trainer.files.export import export_adapter
from peftmux.trainer.host.host import Host
from tests.model.ladders import PaperLadder
from tests.trainer.lowered import lowered_logits
from tests.trainer.method_runs import (
    QUICK,
    check_learns,
    check_whole_runs,
    tensors,
)
from tests.trainer.test_trainer_methods import attach
from tests.trainer.tiny_models import CONFIGS, build_model, random_ids, scramble

OPTIONS: list[dict[str, Any]] = [
    {"layers": [1]},
    {"merge": "gate", "temperature": 0.5},
    {"merge": "add", "hidden_act": "gelu"},
    {"reduction_factor": 1},
]


def paper(base: Any, adapter: Any, tensors: dict[str, Tensor]) -> PaperLadder:
    return PaperLadder(base.requires_grad_(False), adapter.peft_config(), tensors)


def check(shape: str, config: dict[str, Any], folder: Path) -> None:
    model, base, ids = build_model(shape), build_model(shape), random_ids()
    adapter = attach("ladder", model, config)
    scramble(adapter)
    export_adapter(adapter, "base", folder, card="")
    own = {name: t.clone().requires_grad_() for name, t in adapter.tensors().items()}
    assert own.keys() == adapter.parameters.keys()
    logits = model(input_ids=ids).logits
    expected = paper(base, adapter, own).logits(ids)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    model(input_ids=ids, labels=ids).loss.backward()
    base.loss_function(logits=expected, labels=ids, vocab_size=260).backward()
    for name, parameter in adapter.parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, own[name].grad, rtol=1e-3, atol=1e-5, msg=name)
    with torch.no_grad():
        assert (logits - base(input_ids=ids).logits).abs().max() > 1e-2
    lowered = lowered_logits(base, load_adapter(folder, TorchBase(base)), ids)
    torch.testing.assert_close(logits.detach(), lowered, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", CONFIGS)
def test_values_and_gradients_are_the_formulas(shape: str, tmp_path: Path):
    check(shape, {}, tmp_path / "a")


@pytest.mark.parametrize("config", OPTIONS, ids=str)
def test_every_option_means_what_the_formula_says(config: dict[str, Any], tmp_path: Path):
    check("llama", config, tmp_path / "a")


def test_adding_starts_from_the_base():
    model, ids = build_model("llama"), random_ids()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        adapter = attach("ladder", model, {"merge": "add"})
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=1e-6)
        adapter.detach()
        attach("ladder", model)
        assert (model(input_ids=ids).logits - before).abs().max() > 0.1, "replacing cannot"


def test_the_base_is_only_read():
    """Nothing it computes has a gradient, also where another adapter's rows need one."""
    model, ids = build_model("llama"), random_ids(3)
    other = attach("lora", model)
    with Host.of(model).aside():
        ladder = attach("ladder", model)
    for adapter in (other, ladder):
        scramble(adapter)
    layer, seen = model.model.layers[1], []
    layer.register_forward_hook(lambda _m, _a, y: seen.append(y[0] if isinstance(y, tuple) else y))
    with Host.of(model).only(ladder.key):
        model(input_ids=ids, labels=ids).loss.backward()
    assert not seen[-1].requires_grad
    alone = {name: p.grad.clone() for name, p in ladder.parameters.items() if p.grad is not None}
    assert alone.keys() == ladder.parameters.keys()
    for parameter in ladder.parameters.values():
        parameter.grad = None
    with Host.of(model).rows({other.key: 2, ladder.key: 3}):
        both = model(input_ids=torch.cat([ids[:2], ids])).logits
        seen[-1].retain_grad()
        model.loss_function(logits=both[2:], labels=ids, vocab_size=260).backward()
    assert seen[-1].grad is None or not seen[-1].grad.any()
    for name, parameter in ladder.parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, alone[name], rtol=1e-4, atol=1e-6)
    assert all(p.grad is None or not p.grad.any() for p in other.parameters.values())


def test_filling_on_the_left_is_not_seen():
    model, ids = build_model("llama"), random_ids(1)
    scramble(attach("ladder", model))
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones_like(ids)], dim=1)
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        got = model(input_ids=padded, attention_mask=mask).logits[:, 5:]
    torch.testing.assert_close(got, alone, rtol=0, atol=1e-4)


def test_packed_rows_do_not_see_each_other():
    model, (first, second) = build_model("qwen2"), random_ids(2).unbind()
    scramble(attach("ladder", model))
    first = first[:7]
    positions = torch.cat([torch.arange(7), torch.arange(len(second)), torch.zeros(1, dtype=torch.long)])
    ids = torch.cat([first, second, torch.zeros(1, dtype=torch.long)])
    with torch.no_grad():
        together = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
        alone = [model(input_ids=row[None]).logits[0] for row in (first, second)]
    torch.testing.assert_close(together[:-1], torch.cat(alone), rtol=0, atol=1e-4)


def test_a_cache_is_refused_rather_than_ignored():
    model = build_model("llama")
    scramble(attach("ladder", model))
    with pytest.raises(ValueError, match="whole sequences"):
        model.generate(random_ids(1), max_new_tokens=2, do_sample=False)


def test_recomputing_changes_no_number(qwen2: Path, rows: Path, tmp_path: Path):
    for name, extra in (("a", {}), ("b", {"gradient_checkpointing": True})):
        train("ladder", model=qwen2, data=rows, out=tmp_path / name, training={**QUICK, **extra})
    first, second = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"reduction_factor": 0}, "reduction-factor: expected 1 or more, got 0"),
        ({"layers": [2]}, r"layers: expected numbers below 2, got \[2\]"),
        ({"layers": []}, "layers: expected"),
        ({"merge": "mean"}, "merge: expected replace or add or gate, got 'mean'"),
        ({"hidden_act": "swoosh"}, "hidden-act: expected one of"),
        ({"temperature": 0.0}, "temperature: expected"),
    ],
)
def test_what_makes_no_sense_is_refused(config: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=message):
        attach("ladder", build_model("llama"), config)


def test_whole_runs(taught: Path, qwen2: Path, rows: Path, tmp_path: Path):
    check_learns("ladder", taught, rows, tmp_path)
    check_whole_runs("ladder", qwen2, build_model("qwen2"), rows, tmp_path)
