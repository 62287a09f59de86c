"""Heads in adapter files: what is claimed, what names the labels, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.heads import plan_hub_head
from peftmux.adapters.lower import load_adapter, plan_adapter, served_kinds
from peftmux.adapters.torch_base import TorchBase
from peftmux.kernels.head import Head, HeadLayer, apply_head
from tests.folders import CLASSIFIES

WEIGHT, BIAS = "base_model.model.score.weight", "base_model.model.score.bias"
Files = tuple[dict[str, Any], dict[str, Tensor]]


@pytest.mark.parametrize("name", [name for name in CLASSIFIES if not name.startswith("adapterhub/")])
def test_the_heads_of_the_fixtures(name: str, fixtures: Path, llama: TorchBase, qwen2: TorchBase) -> None:
    adapter = load_adapter(fixtures / name, llama if "/llama/" in name else qwen2)
    stored = load_file(fixtures / name / "adapter_model.safetensors")
    head = adapter.parts.head
    assert head is not None
    assert adapter.kind == CLASSIFIES[name]
    assert adapter.tensors == len(stored)
    assert head.kind == ("sequence" if name.endswith("seq_cls") else "token")
    assert head.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert (head.output.bias is None) is (head.kind == "sequence")
    (weight,) = [t for n, t in stored.items() if n.endswith("score.weight")]
    assert torch.equal(head.output.weight, weight)


def alone(labels: int = 2, width: int = 32, **config: Any) -> Files:
    """A head and nothing else."""
    generator = torch.Generator().manual_seed(1)
    return (
        {"peft_type": "HEAD", "task_type": "SEQ_CLS", **config},
        {WEIGHT: torch.randn(labels, width, generator=generator)},
    )


def write(files: Files, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(files[0]))
    save_file(files[1], folder / "adapter_model.safetensors")
    return folder


def test_a_head_alone(llama: TorchBase, tmp_path: Path) -> None:
    files = alone(modules_to_save=["classifier", "score"])
    files[1][BIAS] = torch.ones(2)
    adapter = load_adapter(write(files, tmp_path / "a"), llama)
    assert (adapter.kind, adapter.applied_sites, adapter.parts.places) == ("head", 1, frozenset())
    assert "head" in served_kinds(llama)
    assert adapter.parts.head is not None
    assert torch.equal(apply_head(torch.zeros(3, 32), adapter.parts.head), torch.ones(3, 2))


@pytest.mark.parametrize(
    "fields",
    [
        {"id2label": {"0": "ham", "1": "spam"}},
        {"label2id": {"spam": 1, "ham": 0}},
        {"id2label": {"1": "spam", "0": "ham"}, "label2id": {"ham": 0, "spam": 1}},
    ],
)
def test_labels_have_names(fields: dict[str, Any], llama: TorchBase, tmp_path: Path) -> None:
    adapter = load_adapter(write(alone(**fields), tmp_path / "a"), llama)
    assert adapter.parts.head is not None
    assert adapter.parts.head.labels == ("ham", "spam")


def lora_seq(fixtures: Path) -> Files:
    folder = fixtures / "peft/llama/lora.seq_cls"
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def _without(name: str) -> Callable[[Files], Any]:
    return lambda files: files[1].pop(name)


def _with(name: str, *shape: int) -> Callable[[Files], Any]:
    return lambda files: files[1].update({name: torch.ones(shape)})


def _config(**fields: Any) -> Callable[[Files], Any]:
    return lambda files: files[0].update(fields)


BROKEN: dict[str, tuple[Reason, str, Callable[[Files], Any]]] = {
    "no head": (Reason.MISSING_TENSOR, "the head of a SEQ_CLS adapter", _without(WEIGHT)),
    "a bias alone": (Reason.MISSING_TENSOR, WEIGHT, lambda f: f[1].update({BIAS: f[1].pop(WEIGHT)[:, 0].contiguous()})),
    "two heads": (Reason.UNUSED_TENSOR, "one head", _with("base_model.model.classifier.weight", 3, 32)),
    "in both places": (Reason.UNUSED_TENSOR, "one head", _with("base_model.score.weight", 3, 32)),
    "another width": (Reason.SHAPE_MISMATCH, "expected shape [any, 32]", _with(WEIGHT, 3, 31)),
    "no labels": (Reason.SHAPE_MISMATCH, "expected shape [any, 32]", _with(WEIGHT, 0, 32)),
    "a vector": (Reason.SHAPE_MISMATCH, "expected shape [any, 32]", _with(WEIGHT, 32)),
    "another bias": (Reason.SHAPE_MISMATCH, "expected shape [3]", _with(BIAS, 4)),
    "a layer before it": (
        Reason.UNUSED_TENSOR,
        "classifier.dense",
        _with("base_model.model.classifier.dense.weight", 3, 3),
    ),
    "not finite": (Reason.NOT_FINITE, WEIGHT, lambda f: f[1][WEIGHT].__setitem__((0, 0), float("nan"))),
    "a task of another kind": (Reason.UNSUPPORTED_TASK, "SEQ_CLS or TOKEN_CLS", _config(task_type="QUESTION_ANS")),
    "a task that is no text": (Reason.UNSUPPORTED_TASK, "task_type", _config(task_type=["SEQ_CLS"])),
    "a head that generates": (Reason.UNSUPPORTED_TASK, "score.weight", _config(task_type="CAUSAL_LM")),
    "a head of no task": (Reason.UNSUPPORTED_TASK, "expected SEQ_CLS or TOKEN_CLS", _config(task_type=None)),
    "activated": (Reason.UNSUPPORTED_TASK, "alora_invocation_tokens", _config(alora_invocation_tokens=[9, 10])),
    "labels that are too few": (Reason.INVALID_FIELD, "id2label", _config(id2label={"0": "a", "1": "b"})),
    "labels of other ids": (Reason.INVALID_FIELD, "id2label", _config(id2label={"1": "a", "2": "b", "3": "c"})),
    "one label twice": (Reason.INVALID_FIELD, "id2label", _config(id2label={"0": "a", "1": "b", "2": "a"})),
    "labels that are no text": (Reason.INVALID_FIELD, "id2label", _config(id2label={"0": 1, "1": 2, "2": 3})),
    "labels that disagree": (
        Reason.INVALID_FIELD,
        "label2id",
        _config(id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 1, "b": 0, "c": 2}),
    ),
    "labels in a list": (Reason.INVALID_FIELD, "id2label", _config(id2label=["a", "b", "c"])),
    "an output projection": (Reason.UNKNOWN_SITE, "lm_head", _config(modules_to_save=["score", "lm_head"])),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_heads_are_refused(case: str, fixtures: Path, llama: TorchBase, tmp_path: Path) -> None:
    reason, named, damage = BROKEN[case]
    files = lora_seq(fixtures)
    damage(files)
    with pytest.raises(AdapterInvalid) as refusal:
        load_adapter(write(files, tmp_path / "a"), llama)
    assert (refusal.value.reason, named in str(refusal.value)) == (reason, True), str(refusal.value)


@pytest.mark.parametrize(
    ("reason", "fields", "shapes"),
    [
        (Reason.UNSUPPORTED_TASK, {"task_type": "CAUSAL_LM"}, {}),
        (Reason.UNSUPPORTED_TASK, {"task_type": None}, {WEIGHT: (2, 32)}),
        (Reason.UNSUPPORTED_SITE, {"modules_to_save": ["lm_head"]}, {WEIGHT: (2, 32)}),
        (Reason.UNUSED_TENSOR, {}, {WEIGHT: (2, 32), "base_model.model.lm_head.weight": (96, 32)}),
        (Reason.UNSUPPORTED_FIELD, {"r": 4}, {WEIGHT: (2, 32)}),
    ],
)
def test_a_head_alone_is_nothing_else(reason: Reason, fields: Any, shapes: Any, llama: TorchBase) -> None:
    with pytest.raises(AdapterInvalid) as refusal:
        plan_adapter({"peft_type": "HEAD", "task_type": "SEQ_CLS", **fields}, shapes, llama)
    assert refusal.value.reason == reason


def hub(fixtures: Path, **changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = fixtures / "adapterhub/llama/pfeiffer_with_head"
    config = json.loads((folder / "head_config.json").read_text())["config"]
    return {**config, **changes}, load_file(folder / "model_head.safetensors")


def test_a_head_of_adapterhub(fixtures: Path, llama: TorchBase) -> None:
    """Two layers with tanh between; its formula written out."""
    config, tensors = hub(fixtures, label2id={"a": 0, "b": 1, "c": 2})
    plan = plan_hub_head(config, "a", {name: tuple(t.shape) for name, t in tensors.items()}, llama)
    head = plan.build(tensors)
    assert (head.kind, head.labels, plan.tensors) == ("sequence", ("a", "b", "c"), frozenset(tensors))
    states = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    middle = (states @ tensors["heads.a.1.weight"].T + tensors["heads.a.1.bias"]).tanh()
    expected = middle @ tensors["heads.a.4.weight"].T + tensors["heads.a.4.bias"]
    torch.testing.assert_close(apply_head(states, head), expected)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        (Reason.UNSUPPORTED_FIELD, {"head_type": "question_answering"}),
        (Reason.UNSUPPORTED_FIELD, {"head_type": "multilabel_classification"}),
        (Reason.UNSUPPORTED_FIELD, {"activation_function": "mish"}),
        (Reason.UNSUPPORTED_FIELD, {"use_pooler": True}),
        (Reason.UNSUPPORTED_FIELD, {"layers": 0}),
        (Reason.SHAPE_MISMATCH, {"layers": 3}),
        (Reason.MISSING_TENSOR, {"activation_function": None}),
        (Reason.SHAPE_MISMATCH, {"num_labels": 2}),
        (Reason.UNUSED_TENSOR, {"bias": False}),
        (Reason.INVALID_FIELD, {"label2id": {"a": 0, "b": 1}}),
    ],
)
def test_broken_heads_of_adapterhub_are_refused(
    reason: Reason, changes: dict[str, Any], fixtures: Path, llama: TorchBase
) -> None:
    config, tensors = hub(fixtures, **changes)
    with pytest.raises(AdapterInvalid) as refusal:
        plan_hub_head(config, "a", {name: tuple(t.shape) for name, t in tensors.items()}, llama)
    assert refusal.value.reason == reason


@pytest.mark.parametrize(("activation", "expected"), [("", -1.0), ("relu", 0.0), ("silu", -0.2689), ("tanh", -0.7616)])
def test_activations(activation: str, expected: float) -> None:
    one = torch.eye(1)
    head = Head("token", HeadLayer(one), ("x",), (HeadLayer(one),), activation)
    assert float(apply_head(-one, head)) == pytest.approx(expected, abs=1e-4)


def test_a_token_head_has_a_bias(fixtures: Path, llama: TorchBase, tmp_path: Path) -> None:
    """transformers' token heads do: without it their numbers would be others."""
    config = json.loads((fixtures / "peft/llama/lora.token_cls/adapter_config.json").read_text())
    tensors = load_file(fixtures / "peft/llama/lora.token_cls/adapter_model.safetensors")
    (bias,) = [name for name in tensors if name.endswith("score.bias")]
    del tensors[bias]
    with pytest.raises(AdapterInvalid, match=bias) as refusal:
        load_adapter(write((config, tensors), tmp_path / "a"), llama)
    assert refusal.value.reason == Reason.MISSING_TENSOR


def test_copies_of_a_heads_bias_say_the_same(fixtures: Path, llama: TorchBase, tmp_path: Path) -> None:
    """As bias="all" saves them."""
    config = json.loads((fixtures / "peft/llama/lora.token_cls/adapter_config.json").read_text())
    tensors = load_file(fixtures / "peft/llama/lora.token_cls/adapter_model.safetensors")
    (bias,) = [name for name in tensors if name.endswith("score.bias")]
    copy = bias.replace("score.bias", "score.modules_to_save.bias")
    load_adapter(write((config, {**tensors, copy: tensors[bias].clone()}), tmp_path / "same"), llama)
    with pytest.raises(AdapterInvalid, match=copy):
        load_adapter(write((config, {**tensors, copy: tensors[bias] + 1}), tmp_path / "other"), llama)
