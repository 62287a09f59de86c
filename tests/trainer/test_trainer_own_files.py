"""BitFit, whole layers, DiffPruning: methods whose files are ours. The oracle is the base's own parameters, trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from peftmux.trainer import OptionError, train
from tests.trainer.lowered import check_parts_give_the_models_logits
from tests.trainer.method_runs import (
    QUICK,
    check_learns,
    check_whole_runs,
    tensors,
)
from tests.trainer.test_trainer_methods import attach
from tests.trainer.tiny_models import build_model, random_ids, scramble

P = "base_model.model."
METHODS = ("bitfit", "layers", "diffpruning")
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("bitfit", "llama-biased", {}),
    ("bitfit", "opt", {"bias_terms": "query_intermediate"}),
    ("bitfit", "gpt2", {}),
    ("layers", "gpt2", {}),
    ("layers", "llama", {"trained_layers": [0]}),
    ("layers", "qwen2", {"target_modules": ["lm_head", "embed_tokens", "layers.1.mlp.up_proj"]}),
    ("layers", "gemma3", {"trained_layers": [1], "target_modules": ["q_proj", "q_norm", "post_feedforward_layernorm"]}),
    ("layers", "gemma3", {"target_modules": ["embed_tokens"]}),
    ("layers", "mixtral", {}),
    ("diffpruning", "gpt2", {"sparsity": 0.1}),
    ("diffpruning", "phi3", {"target_modules": ["qkv_proj"], "structured": False}),
]


@pytest.mark.parametrize(("method", "shape", "config"), CASES)
def test_the_files_parts_give_the_models_logits(method: str, shape: str, config: dict[str, Any], tmp_path: Path):
    model, base, ids = build_model(shape), build_model(shape), random_ids()
    adapter = attach(method, model, config)
    scramble(adapter)
    check_parts_give_the_models_logits(model, adapter, base, ids, tmp_path / "a")


@pytest.mark.parametrize(("method", "shape", "config"), CASES[:9])
def test_gradients_are_those_of_the_bases_own_parameters(method: str, shape: str, config: dict[str, Any]):
    """From the start, where the adapter's values are the base's. Tied weights are untied, as in the file."""
    model, plain, ids = build_model(shape), build_model(shape), random_ids()
    adapter = attach(method, model, config)
    model(input_ids=ids, labels=ids).loss.backward()
    if plain.get_output_embeddings().weight is plain.get_input_embeddings().weight:
        plain.get_output_embeddings().weight = torch.nn.Parameter(plain.get_input_embeddings().weight.detach().clone())
    names = [name.removeprefix(P) for name in adapter.parameters]
    assert names
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    for name in names:
        plain.get_parameter(name).requires_grad_(True)
    plain(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in adapter.parameters.items():
        theirs = plain.get_parameter(name.removeprefix(P)).grad
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, theirs, rtol=1e-4, atol=1e-6, msg=name)


def test_bitfit_trains_every_bias_or_the_papers_choice():
    every = {n for n, _ in build_model("opt").named_parameters() if n.endswith(".bias")}
    assert {n.removeprefix(P) for n in attach("bitfit", build_model("opt")).parameters} == every
    few = attach("bitfit", build_model("opt"), {"bias_terms": "query_intermediate"})
    assert {n.split(".", 6)[-1] for n in few.parameters} == {"self_attn.q_proj.bias", "fc1.bias"}
    (note,) = attach("bitfit", build_model("gpt2"), {"bias_terms": "query_intermediate"}).notes
    assert note.startswith("c_attn hold several projections in one layer")


@pytest.mark.parametrize(
    ("method", "shape", "config", "message"),
    [
        ("bitfit", "llama", {}, "bitfit trains biases, of which LlamaForCausalLM has none here: train ln or lora"),
        ("layers", "llama", {"trained_layers": [2]}, "trained-layers: expected numbers from 0 to 1, got 2"),
        ("layers", "llama", {"target_modules": ["nope"]}, "no module that can be trained is named 'nope'"),
        ("layers", "llama", {"trained_layers": [0], "target_modules": ["lm_head"]}, "is named 'lm_head' there"),
        ("diffpruning", "llama", {"sparsity": 0.0}, "sparsity: expected above 0 and at most 1, got 0.0"),
        ("diffpruning", "llama", {"final_share": 1.0}, "final-share: expected 0 or more and below 1"),
        ("diffpruning", "llama", {"l0_weight": float("nan")}, "l0-weight: expected a finite number, got nan"),
    ],
)
def test_what_makes_no_sense_is_refused(method: str, shape: str, config: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=message):
        attach(method, build_model(shape), config)


def test_the_hard_concrete_gate_is_the_papers():
    """Both the draw and the expected count, from the formulas; and the gradient through a draw that is not cut off."""
    adapter: Any = attach("diffpruning", build_model("llama"), {"target_modules": ["q_proj"]})
    layer = next(iter(adapter.layers.values())).train()
    with torch.no_grad():
        layer.alpha.fill_(0.25)
        layer.alpha_matrix.fill_(-0.5)
        layer.w.fill_(2.0)
    layer.seed = 11
    draws = torch.Generator().manual_seed(11)
    u, v = (torch.empty_like(t).uniform_(1e-6, 1 - 1e-6, generator=draws) for t in (layer.alpha, layer.alpha_matrix))
    entry = torch.sigmoid(torch.log(u / (1 - u)) + 0.25) * 3 - 1.5
    whole = torch.sigmoid(torch.log(v / (1 - v)) - 0.5) * 3 - 1.5
    expected = 2 * entry.clamp(0, 1) * whole.clamp(0, 1)
    torch.testing.assert_close(layer.delta(), expected, rtol=1e-4, atol=1e-4)
    count = layer.w.numel() * torch.sigmoid(torch.tensor(0.25)) * torch.sigmoid(torch.tensor(-0.5))
    torch.testing.assert_close(layer.expected_count(), count)
    layer.delta().sum().backward()
    inside = (entry > 0) & (entry < 1)
    slope = 2 * whole.clamp(0, 1) * 3 * torch.sigmoid(torch.log(u / (1 - u)) + 0.25)
    slope = slope * (1 - torch.sigmoid(torch.log(u / (1 - u)) + 0.25)) * inside
    torch.testing.assert_close(layer.alpha.grad, slope, rtol=1e-3, atol=1e-3)


def test_diffpruning_exports_exactly_its_share(qwen2: Path, rows: Path, tmp_path: Path):
    result = train("diffpruning", model=qwen2, data=rows, out=tmp_path / "a", config={"sparsity": 0.02}, training=QUICK)
    adapter: Any = result.adapter
    kept = sum(t.numel() for name, t in tensors(tmp_path / "a").items() if name.endswith("diff_values"))
    assert kept == round(0.02 * sum(layer.w.numel() for layer in adapter.layers.values()))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["sparsity"]) == ("DIFFPRUNING", 0.02)


def test_the_penalty_takes_entries_away():
    """With a strong penalty and nothing to learn, alpha falls, by its own learning rate."""
    adapter: Any = attach("diffpruning", build_model("llama"), {"l0_weight": 1.0})
    groups = adapter.optimizer_groups(0.1, 1e-3)
    assert [group.get("lr") for group in groups] == [None, 0.1]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    before = adapter.regulariser().item()
    for _ in range(20):
        adapter.regulariser().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert adapter.regulariser().item() < before / 1.1


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_its_task_with_the_defaults(method: str, taught: Path, rows: Path, tmp_path: Path):
    check_learns(method, taught, rows, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_whole_runs(method: str, qwen2: Path, rows: Path, tmp_path: Path):
    check_whole_runs(method, qwen2, build_model("qwen2"), rows, tmp_path)
