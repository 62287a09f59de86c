"""LoRAMoE and MixLoRA: against the papers' formulas written out token by token, and against the lowered parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peftmux.trainer import OptionError, train
from peftmux.trainer.files.export import export_adapter
from peftmux.trainer.methods.loramoe import balance as variation
from peftmux.trainer.methods.mixlora import balance, load
from tests.trainer.lowered import check_parts_give_the_models_logits
from tests.trainer.method_runs import QUICK, check_learns, check_whole_runs
from tests.trainer.test_trainer_methods import attach
from tests.trainer.tiny_models import build_model, random_ids, scramble

MIXTURES = ("loramoe", "mixlora")


def rows_of(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("shape", ["llama-biased", "gpt2", "phi3", "gemma3"])
@pytest.mark.parametrize("method", MIXTURES)
def test_the_files_parts_give_the_models_logits(method: str, shape: str, tmp_path: Path):
    model, base, ids = build_model(shape), build_model(shape), random_ids()
    adapter = attach(method, model)
    scramble(adapter)
    lowered = check_parts_give_the_models_logits(model, adapter, base, ids, tmp_path / "a")
    assert lowered.kind == method


def same_gradients(change: Any, ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    named = dict(change.named_parameters())
    found = [torch.autograd.grad(y.square().sum(), list(named.values())) for y in (ours, expected)]
    for name, one, other in zip(named, *found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3, msg=name)


def test_loramoe_is_the_papers_formula():
    model = build_model("llama")
    adapter = attach("loramoe", model, {"num_experts": 3, "r": 2, "lora_alpha": 5})
    scramble(adapter)
    change: Any = adapter.changes["model.layers.0.mlp.up_proj"]
    x, y = rows_of(2, 4, 32), rows_of(2, 4, 48)
    out = []
    for row, base in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True):
        shares = torch.softmax(change.router @ row, 0)
        own = [shares[e] * (change.experts.B[e] @ (change.experts.A[e] @ row)) for e in range(3)]
        out.append(base + 5 / 2 * sum(own))
    same_gradients(change, change.after(y, x), torch.stack(out).view_as(y))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_mixlora_is_the_papers_formula(top_k: int):
    model = build_model("llama-biased")
    mlp = build_model("llama-biased").model.layers[0].mlp
    adapter = attach("mixlora", model, {"num_experts": 4, "r": 3, "lora_alpha": 6, "top_k": top_k})
    scramble(adapter)
    change: Any = adapter.changes["model.layers.0.mlp"]
    x = rows_of(2, 5, 32)

    def projection(name: str, e: int, row: Tensor) -> Tensor:
        layer, own = getattr(mlp, name), change.experts[name]
        wide: Tensor = layer.weight @ row + layer.bias + 2.0 * (own.B[e] @ (own.A[e] @ row))
        return wide

    out = []
    for row in x.flatten(0, 1):
        shares = torch.softmax(change.router @ row, 0)
        chosen = shares.argsort(descending=True)[:top_k]
        total = shares[chosen].sum()
        one = torch.zeros(32)
        for e in chosen.tolist():
            gate, up = projection("gate_proj", e, row), projection("up_proj", e, row)
            one = one + shares[e] / total * projection("down_proj", e, gate * gate.sigmoid() * up)
        out.append(one)
    if top_k == 1:
        change.router.requires_grad_(False)  # a share of one has no gradient
    expected = torch.stack(out).view_as(x)
    ours = change.after(torch.zeros_like(x), x)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    named = {name: p for name, p in change.named_parameters() if p.requires_grad}
    found = [torch.autograd.grad(y.square().sum(), list(named.values())) for y in (ours, expected)]
    for name, one, other in zip(named, *found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3, msg=name)


def test_the_balance_losses_are_the_papers():
    shares = torch.tensor([[[0.5, 0.5], [0.9, 0.1]], [[0.2, 0.8], [9.0, 9.0]]])
    counted = torch.tensor([[True, True], [True, False]])
    importance = torch.tensor([0.7, 0.3, 0.2, 0.8])
    torch.testing.assert_close(variation(shares, counted), importance.var(correction=0) / importance.mean())
    x = torch.tensor([[2.0, 0.0, 0.0], [2.0, 1.0, 0.0], [0.0, 2.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    mean = x[:4].softmax(1).mean(0)
    told = torch.tensor([[True, True, True, True, False]])
    torch.testing.assert_close(balance(*load(x.softmax(1)[None], told)), 3 * (0.75 * mean[0] + 0.25 * mean[1]))
    torch.testing.assert_close(balance(*load(torch.eye(3)[None], told[:, :3])), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("method", "shape", "options"),
    [*((m, "qwen2", {}) for m in MIXTURES), ("loramoe", "opt", {"target_modules": ["fc1", "fc2"]})],
)
def test_padding_does_not_change_the_balance(method: str, shape: str, options: dict[str, Any]):
    """OPT gives its feed-forward layers all tokens in one dimension."""
    model = build_model(shape)
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # OPT's own
    adapter = attach(method, model, options)
    scramble(adapter)
    model.train()
    ids = random_ids()
    labels = ids.clone()
    labels[0, 8:] = -100
    found = []
    for extra in (0, 5):
        wide, told = (torch.nn.functional.pad(t, (0, extra), value=v) for t, v in ((ids, 0), (labels, -100)))
        model(input_ids=wide, labels=told)
        added = adapter.regulariser()
        assert added is not None
        found.append(added)
    torch.testing.assert_close(found[0], found[1])
    cropped = labels[:, 3:]
    model(input_ids=ids, labels=cropped, logits_to_keep=9)
    torch.testing.assert_close(adapter.regulariser(), found[0])


@pytest.mark.parametrize("method", MIXTURES)
def test_label_smoothing_keeps_the_balance(method: str, qwen2: Path, rows: Path, tmp_path: Path):
    """transformers' Trainer then gives the model no labels."""
    found = []
    for smoothing in (0.0, 0.1):
        training = {**QUICK, "max_steps": 1, "label_smoothing_factor": smoothing}
        run: dict[str, Any] = {"model": qwen2, "data": rows, "out": tmp_path / f"{smoothing}", "training": training}
        added = train(method, **run).adapter.regulariser()
        assert added is not None
        found.append(added)
    assert found[0] > 0
    torch.testing.assert_close(found[0], found[1])


class Sizes(TorchDispatchMode):
    """The operations whose results' sizes are in a tensor's values: for each the host waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        indices = args[1] if name.startswith("index.") else ()
        masked = any(index is not None and index.dtype == torch.bool for index in indices)
        if masked or name.split(".")[0] in ("nonzero", "bincount", "masked_select", "_local_scalar_dense"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_a_block_waits_for_no_expert(monkeypatch: pytest.MonkeyPatch):
    """A GPU's results are read once a pass: how many tokens each expert has."""
    lists: list[Tensor] = []
    to_list = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: lists.append(self) or to_list(self))  # type: ignore[func-returns-value]
    adapter = attach("mixlora", build_model("qwen2"))
    change: Any = adapter.changes["model.layers.0.mlp"]
    change.train()
    monkeypatch.setattr(adapter, "_last", torch.tensor([4, 2]))
    with Sizes() as sizes:
        change.after(None, rows_of(2, 5, 32)).sum().backward()
    assert change.load is not None
    assert not sizes.seen, sizes.seen
    assert [len(counts) for counts in lists] == [8]


def test_a_router_that_prefers_one_expert_learns_to_spread():
    x, router = rows_of(64, 16) + 1.0, rows_of(4, 16) * 0.02
    router[0] += 0.1
    router.requires_grad_()
    optimizer = torch.optim.Adam([router], lr=0.02)
    losses = []
    for _ in range(30):
        loss = balance(*load((x @ router.T).softmax(1)[None], torch.ones(1, 64, dtype=torch.bool)))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > 1.5
    assert min(losses) < 1.2, losses


@pytest.mark.parametrize(
    ("method", "shape", "config", "message"),
    [
        ("mixlora", "mixtral", {}, "expected projections of a feed-forward block of MixtralForCausalLM, got none"),
        ("mixlora", "llama", {"target_modules": ["q_proj"]}, "expected projections of a feed-forward block"),
        ("mixlora", "llama", {"top_k": 9}, "top-k: expected 1 to 8, the experts; got 9"),
        ("loramoe", "llama", {"num_experts": 1}, "num-experts: expected 2 to 256, got 1"),
        ("loramoe", "llama", {"r": 0}, "r: expected 1 or more, got 0"),
        ("loramoe", "llama", {"balance_weight": -1.0}, "balance-weight: expected 0 or more"),
        ("loramoe", "llama", {"target_modules": ["nope"]}, "no linear layer is named 'nope'"),
    ],
)
def test_what_makes_no_sense_is_refused(method: str, shape: str, config: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=message):
        attach(method, build_model(shape), config)


def test_targets_decide_what_has_experts(tmp_path: Path):
    adapter = attach("mixlora", build_model("llama"), {"target_modules": ["up_proj", "v_proj"]})
    assert {name.rpartition(".")[2] for name in adapter.changes} == {"mlp", "v_proj"}
    adapter = attach("loramoe", build_model("llama"))
    assert {name.rpartition(".")[2] for name in adapter.changes} == {"gate_proj", "up_proj", "down_proj"}
    export_adapter(adapter, "base", tmp_path / "a", card="")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
    assert (config["num_experts"], config["r"], config["routing_strategy"]) == (6, 4, "loramoe")


@pytest.mark.parametrize("method", MIXTURES)
def test_a_run_learns_its_task_with_the_defaults(method: str, taught: Path, rows: Path, tmp_path: Path):
    check_learns(method, taught, rows, tmp_path)


@pytest.mark.parametrize("method", MIXTURES)
def test_whole_runs(method: str, qwen2: Path, rows: Path, tmp_path: Path):
    check_whole_runs(method, qwen2, build_model("qwen2"), rows, tmp_path)
