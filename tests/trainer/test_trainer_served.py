"""What a run writes is what a server takes; a run that would write something else is refused before its first step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import ShiraConfig, get_peft_model
from transformers import AutoModelForCausalLM, OPTConfig, Qwen2MoeConfig

from peftmux.adapters.lower import load_adapter
from peftmux.adapters.torch_base import TorchBase
from peftmux.trainer import OptionError, train
from peftmux.trainer.files.served import check_served
from peftmux.trainer.methods import METHODS, AttachContext, AttachedAdapter
from peftmux.trainer.methods.bottleneck import BottleneckAdapter
from peftmux.trainer.settings.options import build_config
from tests.trainer.method_runs import QUICK, tensors
from tests.trainer.tiny_models import COMMON, HEADS, build_model, build_tokenizer, copy_task, random_ids, write_rows

ALONE = set(METHODS) - {"fusion", "head", "vora"}
"""What is attached without folders, classes or images; those three are checked in whole runs of their own tests."""
BEFORE: dict[str, Any] = {"training": {**QUICK, "max_steps": 1}}


@pytest.fixture(scope="module")
def narrow_opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of 16 that a projection makes 32 of."""
    own: dict[str, Any] = {
        "word_embed_proj_dim": 16,
        "ffn_dim": 48,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    return _saved(OPTConfig(**COMMON, **own), tmp_path_factory.mktemp("opt"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its shared_expert_gate is [1, 32]."""
    sizes: dict[str, Any] = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    return _saved(Qwen2MoeConfig(**COMMON, **HEADS, **sizes), tmp_path_factory.mktemp("experts"))


def _saved(config: Any, folder: Path) -> Path:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("method", "config"),
    [("prompt", {}), ("p-tuning", {}), ("p-tuning", {"template": ["2@0", "1@-1"]}), ("multitask-prompt", {})],
)
def test_virtual_tokens_are_as_wide_as_the_embedding(
    method: str, config: dict[str, Any], narrow_opt: Path, tmp_path: Path
):
    rows = write_rows(tmp_path / "rows.jsonl", [{**row, "task": row["prompt"][0]} for row in copy_task(24)])
    tokens = {} if "template" in config else {"num_virtual_tokens": 3}
    result = train(method, model=narrow_opt, data=rows, out=tmp_path / "a", config={**tokens, **config}, **BEFORE)
    base = AutoModelForCausalLM.from_pretrained(narrow_opt)
    assert load_adapter(tmp_path / "a", TorchBase(base)).digest == result.digest


def test_shira_leaves_out_what_has_too_few_entries(experts: Path, rows: Path, tmp_path: Path):
    """PEFT refuses such a layer, as we do where it is asked for."""
    result = train("shira", model=experts, data=rows, out=tmp_path / "a", **BEFORE)
    base = AutoModelForCausalLM.from_pretrained(experts)
    assert load_adapter(tmp_path / "a", TorchBase(base)).digest == result.digest
    assert not any("gate." in name for name in tensors(tmp_path / "a"))
    small = "2 layers, e.g. model.layers.0.mlp.shared_expert_gate [1, 32], have fewer than r * (in + out) entries"
    assert any(note.startswith(small) for note in result.adapter.notes)
    assert small in (tmp_path / "a" / "README.md").read_text()
    named: dict[str, Any] = {"target_modules": ["q_proj", "shared_expert_gate"]}
    with pytest.raises(OptionError, match=r"r: expected at most 0 for .*shared_expert_gate \[1, 32\].*; got 8"):
        train("shira", model=experts, data=rows, out=tmp_path / "b", config=named, **BEFORE)
    with pytest.raises(ValueError, match="more shira params than the total number"):
        get_peft_model(base, ShiraConfig(r=8, **named))


def test_pissa_has_no_more_directions_than_the_weight(qwen2: Path, rows: Path, tmp_path: Path):
    run: dict[str, Any] = {"model": qwen2, "data": rows, "out": tmp_path / "a", **BEFORE}
    with pytest.raises(OptionError, match=r"r: expected at most 32 for model\.layers\.0\.\S+ \[32, 48\], got 100"):
        train("pissa", **run, config={"r": 100})
    pattern = {"r": 32, "rank_pattern": {"k_proj": 16, "v_proj": 17}}
    with pytest.raises(OptionError, match=r"r: expected at most 16 for model\.layers\.0\.self_attn\.v_proj .*, got 17"):
        train("pissa", **run, config=pattern)
    train("pissa", **run, config={**pattern, "rank_pattern": {"k_proj": 16, "v_proj": 16}})


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_a_template_is_for_generation(task: str, qwen2: Path, tmp_path: Path):
    labels = {"sequence": "up", "token": ["up", "up"]}
    text: dict[str, Any] = {"sequence": {"text": "ab"}, "token": {"tokens": ["a", "b"]}}
    data = write_rows(tmp_path / "rows.jsonl", [{**text[task], "labels" if task == "token" else "label": labels[task]}])
    given: dict[str, Any] = {"task": task, "labels": ["up", "down"], "config": {"template": ["2@0", "1@1"]}}
    with pytest.raises(OptionError, match=f"template: .*generation.* got --task {task}"):
        train("p-tuning", model=qwen2, data=data, out=tmp_path / "a", **given, **BEFORE)


@pytest.mark.parametrize("method", sorted(ALONE))
def test_the_check_changes_nothing(method: str):
    model, ids = build_model("llama-biased"), random_ids()
    own = {"tasks": ["a", "b"]} if method == "multitask-prompt" else {}
    config = build_config(METHODS[method].config_class, own)
    model.train()
    adapter = METHODS[method].attach(model, config, AttachContext(seed=0))
    modules, state, before = list(model.modules()), torch.get_rng_state(), model(input_ids=ids).logits
    torch.set_rng_state(state)
    check_served(adapter, "base", model)
    assert torch.equal(torch.get_rng_state(), state)
    assert {id(module) for module in model.modules()} >= {id(change) for change in adapter.changes.values()}
    assert len(list(model.modules())) == len(modules)
    assert all(module.training for module in model.modules())
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("r", 3, "model.layers.0.mlp.down_proj: expected rank 3 as the config says, got 8 in tensor"),
        ("layer_replication", [[0, 1]], "field layer_replication is not served"),
    ],
)
def test_what_a_server_would_refuse_is_not_begun(
    field: str, value: Any, message: str, qwen2: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    own = AttachedAdapter.peft_config
    monkeypatch.setattr(AttachedAdapter, "peft_config", lambda adapter: {**own(adapter), field: value})
    said = refusal("lora", qwen2, rows, tmp_path)
    assert said.startswith(f"method: a server would refuse this lora adapter: {message}")


def test_nor_in_folders_of_adapterhubs(qwen2: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = BottleneckAdapter.folder

    def folder(adapter: Any, *given: Any) -> dict[str, bytes]:
        return {name: data.replace(b'"swish"', b'"nope"') for name, data in files(adapter, *given).items()}

    monkeypatch.setattr(BottleneckAdapter, "folder", folder)
    assert re.match(
        "method: a server would refuse this houlsby adapter: .*nope", refusal("houlsby", qwen2, rows, tmp_path)
    )


def refusal(method: str, base: Path, rows: Path, folder: Path) -> str:
    """Nothing is written."""
    with pytest.raises(OptionError) as caught:
        train(method, model=base, data=rows, out=folder / "a", training=QUICK)
    assert list(folder.iterdir()) == []
    return str(caught.value)
