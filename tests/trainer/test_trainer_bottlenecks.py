"""Bottlenecks and their fusion: against AdapterHub's own logits, plain torch, and the parts that the files lower to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from peftmux.adapters.lower import load_adapter
from peftmux.adapters.torch_base import TorchBase
from peftmux.kernels.head import apply_head
from peftmux.trainer import OptionError, train
from peftmux.trainer.host.host import Host
from tests.adapters.conftest import FIXTURES
from tests.trainer.lowered import check_parts_give_the_models_logits, lowered_logits
from tests.trainer.method_runs import (
    QUICK,
    check_files_give_the_models_logits,
    check_learns,
    check_resumes,
    check_seeds,
    check_whole_runs,
    tensors,
)
from tests.trainer.test_trainer_methods import attach
from tests.trainer.tiny_models import build_model, copy_task, random_ids, scramble, write_rows

FORMS = ("houlsby", "pfeiffer", "parallel")
HUB = FIXTURES / "adapterhub" / "llama"


def hub_base() -> Any:
    return AutoModelForCausalLM.from_pretrained(FIXTURES / "base" / "llama").eval()


@torch.no_grad()
def take(adapter: Any, stored: dict[str, Tensor], name: str) -> None:
    """AdapterHub's values into our parameters."""
    for branch in adapter.branches:
        place = {"attention": "attention_adapters", "feed_forward": "output_adapters"}[branch.role]
        for key, parameter in adapter.changes[branch.name].hub_tensors().items():
            parameter.copy_(stored[f"{branch.name.rpartition('.')[0]}.{place}.{name}.{key}"])


@pytest.mark.parametrize(
    ("folder", "method", "config"),
    [
        ("houlsby_double_seq_bn", "houlsby", {}),
        ("pfeiffer_seq_bn", "pfeiffer", {}),
        ("pfeiffer_leave_out_0", "pfeiffer", {"leave_out": [0]}),
        ("parallel_par_bn", "parallel", {}),
    ],
)
def test_with_adapterhubs_tensors_the_model_has_adapterhubs_logits(folder: str, method: str, config: dict[str, Any]):
    model, expected = hub_base(), load_file(HUB / folder / "expected.safetensors")
    adapter = attach(method, model, {"reduction_factor": 8, **config})
    take(adapter, load_file(HUB / folder / "adapter.safetensors"), "adapters.a")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=expected["input_ids"]).logits, expected["logits"], rtol=0, atol=1e-4)


def test_a_fusion_with_adapterhubs_tensors_has_its_logits():
    model, expected = hub_base(), load_file(HUB / "fusion" / "expected.safetensors")
    adapter = attach("fusion", model, {"adapters": [str(HUB / "fusion" / name) for name in ("a", "b")]})
    take(adapter, load_file(HUB / "fusion" / "fusion" / "model_adapter_fusion.safetensors"), "adapter_fusion_layer.a,b")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=expected["input_ids"]).logits, expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", ["llama-biased", "gpt2", "phi3", "mixtral"])
@pytest.mark.parametrize("method", FORMS)
def test_the_files_parts_give_the_models_logits(method: str, shape: str, tmp_path: Path):
    model, base, ids = build_model(shape), build_model(shape), random_ids()
    norms = {"ln_before": True, "ln_after": True} if shape == "gpt2" else {}
    adapter = attach(method, model, {"reduction_factor": 4, **norms})
    scramble(adapter)
    lowered = check_parts_give_the_models_logits(model, adapter, base, ids, tmp_path / "a")
    assert lowered.kind == method


def plain_logits(model: Any, method: str, weights: dict[str, Tensor], scaling: float) -> Tensor:
    """A Llama written out: h + y + scaling * U act(D z + d) + u, with the papers' z, by the files' names."""
    body = model.model
    ids = random_ids()
    h = body.embed_tokens(ids)
    turns = body.rotary_emb(h, torch.arange(ids.shape[1])[None])
    mask = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)[None, None]

    def adapted(y: Tensor, h: Tensor, layer: int, place: str) -> Tensor:
        stem = f"model.layers.{layer}.{place}.adapters.adapter."
        if f"{stem}adapter_up.bias" not in weights:
            return h + y
        z = {"houlsby": y, "pfeiffer": h + y, "parallel": h}[method]
        inner = z @ weights[f"{stem}adapter_down.0.weight"].T + weights[f"{stem}adapter_down.0.bias"]
        inner = inner * inner.sigmoid() if method == "houlsby" else inner.clamp(min=0)
        return h + y + scaling * (inner @ weights[f"{stem}adapter_up.weight"].T + weights[f"{stem}adapter_up.bias"])

    for index, layer in enumerate(body.layers):
        attended = layer.self_attn(layer.input_layernorm(h), position_embeddings=turns, attention_mask=mask)[0]
        h = adapted(attended, h, index, "attention_adapters")
        h = adapted(layer.mlp(layer.post_attention_layernorm(h)), h, index, "output_adapters")
    logits: Tensor = model.lm_head(body.norm(h))
    return logits


@pytest.mark.parametrize(("method", "scaling"), [("houlsby", 1.0), ("pfeiffer", 0.5), ("parallel", 4.0)])
def test_values_and_gradients_are_the_papers(method: str, scaling: float):
    model = build_model("llama")
    adapter: Any = attach(method, model, {"scaling": scaling, "reduction_factor": 4})
    scramble(adapter)
    weights = {name: tensor.clone().requires_grad_() for name, tensor in adapter.tensors().items()}
    expected = plain_logits(build_model("llama"), method, weights, scaling)
    ours = model(input_ids=random_ids()).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    for logits in (ours, expected):
        logits.square().mean().backward()
    for branch in adapter.branches:
        place = {"attention": "attention_adapters", "feed_forward": "output_adapters"}[branch.role]
        for key, parameter in adapter.changes[branch.name].hub_tensors().items():
            theirs = weights[f"{branch.name.rpartition('.')[0]}.{place}.adapters.adapter.{key}"].grad
            torch.testing.assert_close(parameter.grad, theirs, rtol=1e-3, atol=1e-5, msg=key)


@pytest.fixture(scope="module")
def stages(qwen2: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two Pfeiffer adapters, trained from different seeds."""
    folder = tmp_path_factory.mktemp("stages")
    for seed in (1, 2):
        out = folder / f"task {seed}"
        train("pfeiffer", model=qwen2, data=rows, out=out, training={**QUICK, "seed": seed, "learning_rate": 0.05})
    return [str(folder / f"task {seed}") for seed in (1, 2)]


def test_fusing_leaves_the_adapters_as_they_are(stages: list[str], qwen2: Path, rows: Path, tmp_path: Path):
    config = {"adapters": stages}
    check_files_give_the_models_logits("fusion", "fusion", qwen2, build_model("qwen2"), rows, tmp_path, config)
    for folder, name in zip(stages, ("task_1", "task_2"), strict=True):
        before, after = tensors(Path(folder)), tensors(tmp_path / "a" / name)
        assert {n.replace(".adapters.adapter.", f".adapters.{name}."): t.tolist() for n, t in before.items()} == {
            n: t.tolist() for n, t in after.items()
        }
    adapter = attach("fusion", build_model("qwen2"), config)
    assert adapter.regulariser() is not None
    assert float(adapter.regulariser()) < 1e-6, "values start at the identity"  # type: ignore[arg-type]
    for name in ("seeds", "resumes"):
        (tmp_path / name).mkdir()
    check_seeds("fusion", qwen2, rows, tmp_path / "seeds", config)
    check_resumes("fusion", qwen2, rows, tmp_path / "resumes", config)


def test_a_fusion_learns(taught: Path, rows: Path, tmp_path: Path):
    """Of an adapter that does the task and one that does the contrary it finds the first."""
    training = {"max_steps": 80, "per_device_train_batch_size": 16, "disable_tqdm": True}
    lower = [{**row, "completion": row["completion"].lower()} for row in copy_task(64)]
    for name, data in (("able", rows), ("contrary", write_rows(tmp_path / "lower.jsonl", lower))):
        train("houlsby", model=taught, data=data, out=tmp_path / name, training=training)
    check_learns("fusion", taught, rows, tmp_path, {"adapters": [str(tmp_path / n) for n in ("able", "contrary")]}, 0.3)


@pytest.mark.parametrize("method", FORMS)
def test_a_run_learns_its_task_with_the_defaults(method: str, taught: Path, rows: Path, tmp_path: Path):
    check_learns(method, taught, rows, tmp_path)


@pytest.mark.parametrize("method", FORMS)
def test_whole_runs(method: str, qwen2: Path, rows: Path, tmp_path: Path):
    check_whole_runs(method, qwen2, build_model("qwen2"), rows, tmp_path, {"adapterdrop": 1})


def test_adapterdrop_in_training_and_in_the_file(qwen2: Path, rows: Path, tmp_path: Path):
    adapter: Any = attach("pfeiffer", build_model("qwen2"), {"adapterdrop": 1})
    seen = set()
    for step in range(20):
        adapter.before_step(step, 20)
        seen.add(tuple(adapter.changes[branch.name].on for branch in adapter.branches))
        adapter.after_step(step, 20)
        assert all(adapter.changes[branch.name].on for branch in adapter.branches)
    assert seen == {(True, True), (False, True)}
    config = {"adapterdrop": 1, "drop_first": 1}
    check_files_give_the_models_logits("pfeiffer", "pfeiffer", qwen2, build_model("qwen2"), rows, tmp_path, config)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["config"]["leave_out"] == [0]
    assert not any("layers.0." in name for name in tensors(tmp_path / "a"))


@pytest.mark.parametrize("method", ["houlsby", "fusion"])
def test_they_classify(method: str, stages: list[str], qwen2: Path, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": t, "label": t.upper()} for t in ("a", "b", "c", "a")])
    config = {"adapters": stages} if method == "fusion" else {}
    run: dict[str, Any] = {"model": qwen2, "data": rows, "task": "sequence", "config": config, "training": QUICK}
    result = train(method, **run, out=tmp_path / "a")
    base, ids = build_model("qwen2"), random_ids()
    lowered = load_adapter(tmp_path / "a", TorchBase(base))
    states: list[Any] = []
    hook = base.base_model.register_forward_hook(lambda *call: states.append(call[-1].last_hidden_state))
    lowered_logits(base, lowered, ids)
    hook.remove()
    assert lowered.parts.head is not None
    assert lowered.parts.head.labels == ("A", "B", "C")
    assert (tmp_path / "a" / ("fusion" if method == "fusion" else "") / "head_config.json").is_file()
    with torch.no_grad():
        result.model(input_ids=ids)
        ours = result.adapter.head(Host.of(result.model).hidden)  # type: ignore[misc]
    torch.testing.assert_close(ours, apply_head(states[-1], lowered.parts.head), rtol=0, atol=1e-5)


def test_another_form_takes_the_place_of_the_old(stages: list[str], qwen2: Path, rows: Path, tmp_path: Path):
    """A folder is always read as what was written last, whatever stood there before."""
    run: dict[str, Any] = {"model": qwen2, "data": rows, "out": tmp_path / "a", "training": {**QUICK, "max_steps": 1}}
    for method, config in (("lora", {}), ("fusion", {"adapters": stages}), ("houlsby", {}), ("ln", {})):
        result = train(method, **run, config=config, overwrite=True)
        adapter = load_adapter(tmp_path / "a", TorchBase(build_model("qwen2")))
        assert (adapter.kind, adapter.digest) == (method, result.digest)


@pytest.mark.parametrize(
    ("method", "shape", "config", "message"),
    [
        ("houlsby", "opt", {}, "method: bottlenecks do not fit OPTForCausalLM"),
        ("pfeiffer", "gemma2", {}, "method: bottlenecks do not fit Gemma2ForCausalLM"),
        ("houlsby", "llama", {"leave_out": [2]}, "leave-out: expected numbers of layers from 0 to 1, got 2"),
        ("houlsby", "llama", {"leave_out": [0, 1]}, "leave-out: expected some layer to be left"),
        ("houlsby", "llama", {"drop_first": 1}, "drop-first: expected 0 to 0, what --adapterdrop trains for; got 1"),
        ("houlsby", "llama", {"drop_first": 2, "adapterdrop": 2}, "adapterdrop: expected 1 at most, so that some"),
        ("houlsby", "llama", {"non_linearity": "softmax"}, "non-linearity: expected one of .*got 'softmax'"),
        ("houlsby", "llama", {"reduction_factor": 0}, "reduction-factor: expected more than 0, got 0"),
        ("parallel", "llama", {"scaling": float("nan")}, "scaling: expected a finite number, got nan"),
        ("parallel", "llama", {"scaling": 0.0}, "scaling: expected a number other than 0"),
        ("fusion", "llama", {"adapters": ["a"]}, "adapters: expected two or more folders, got 1"),
        ("fusion", "llama", {"adapters": ["x/a", "y/a"]}, "adapters: expected folders with different last names"),
        ("fusion", "llama", {"adapters": ["/no/a", "/no/b"]}, "adapters: /no/a: no adapter folder"),
    ],
)
def test_what_makes_no_sense_is_refused(method: str, shape: str, config: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=message):
        attach(method, build_model(shape), config)


def test_only_bottlenecks_of_one_form_are_fused(stages: list[str], qwen2: Path, rows: Path, tmp_path: Path):
    run: dict[str, Any] = {"model": qwen2, "data": rows, "training": {**QUICK, "max_steps": 1}}
    for method, message in (
        ("lora", "expected a bottleneck adapter in AdapterHub's files"),
        ("parallel", "is_parallel: expected false in a fusion, got true"),
        ("houlsby", "in the same layers, houlsby is in others"),
    ):
        train(method, **run, out=tmp_path / method)
        with pytest.raises(OptionError, match=message):
            attach("fusion", build_model("qwen2"), {"adapters": [stages[0], str(tmp_path / method)]})
    other = shutil.copytree(stages[0], tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    config["config"]["original_ln_before"] = False
    (other / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(OptionError, match="of one form, got such that read branch and sum"):
        attach("fusion", build_model("qwen2"), {"adapters": [stages[0], str(other)]})
