"""AdapterHub's fusion against the library's order of operations, the heads in its folder, and bottlenecks by hooks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from peftmux.adapters.errors import AdapterInvalid
from peftmux.adapters.lower import load_adapter
from peftmux.adapters.torch_base import TorchBase
from tests.adapters.peft_models import make_model
from tests.adapters.test_adapterhub import BN, make
from tests.adapters.test_hub_lora import INTERFACE
from tests.adapters.test_hub_refusals import inner, with_head
from tests.adapters.test_vocabulary_against_peft import IDS

NAMES = ("a", "b", "c")
ON = dict.fromkeys(("key", "query", "value", "value_before_softmax"), True)
FORMS: dict[str, dict[str, Any]] = {
    "sum": {},
    "branch": {"original_ln_before": False, "mh_adapter": True},
    "normed after": {"ln_after": True},
    "normed before, a learned scale": {"ln_before": True, "scaling": "learned"},
}


def make_fusion(config: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """Three adapters and their fusion, beside each other. All tensors by name."""
    found: dict[str, Tensor] = {}
    for seed, name in enumerate(NAMES):
        own = make("llama", config, folder / name, seed)
        own = {key.replace(".adapters.a.", f".adapters.{name}."): tensor for key, tensor in own.items()}
        save_file(own, folder / name / "adapter.safetensors")
        path = folder / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"name": name}))
        found |= own
    generator = torch.Generator().manual_seed(9)
    fused: dict[str, Tensor] = {}
    for site in sorted({key.split(".adapters.")[0] for key in found}):
        stem = f"{site}.adapter_fusion_layer.{','.join(NAMES)}."
        shapes = {"query": (32, 32), "key": (32, 32), "value": (32, 32)}
        fused |= {f"{stem}{part}.weight": 0.3 * torch.randn(shapes[part], generator=generator) for part in shapes}
        fused |= {f"{stem}{part}.bias": 0.3 * torch.randn(32, generator=generator) for part in ("query", "key")}
    save_file(fused, folder / "model_adapter_fusion.safetensors")
    whole = {"config": ON, "name": ",".join(NAMES), "version": "adapters.1.3.0"}
    (folder / "adapter_fusion_config.json").write_text(json.dumps(whole))
    return found | fused


def fuse(site: str, config: dict[str, Any], tensors: dict[str, Tensor], out: Tensor, stream: Tensor) -> Tensor:
    """What the library's fusion layer makes of a branch's output."""
    x = out + stream if config["original_ln_before"] else out
    ups = []
    for name in NAMES:
        stem, z, position = f"{site}.adapters.{name}.", x, 0
        if config["ln_before"]:
            position = 1
            weight, bias = (tensors[f"{stem}adapter_norm_before.{n}"] for n in ("weight", "bias"))
            z = F.layer_norm(x, (32,), weight, bias)
        down = F.linear(z, *(tensors[f"{stem}adapter_down.{position}.{n}"] for n in ("weight", "bias")))
        up = F.linear(down.relu(), *(tensors[f"{stem}adapter_up.{n}"] for n in ("weight", "bias")))
        ups.append(up * tensors.get(f"{stem}scaling", 1.0))
    stack, stem = torch.stack(ups, 2), f"{site}.adapter_fusion_layer.{','.join(NAMES)}."
    query = F.linear(x, tensors[f"{stem}query.weight"], tensors[f"{stem}query.bias"])
    key = F.linear(stack, tensors[f"{stem}key.weight"], tensors[f"{stem}key.bias"])
    weights = (key @ query.unsqueeze(-1)).squeeze(-1).softmax(-1)
    return (weights.unsqueeze(-1) * F.linear(stack, tensors[f"{stem}value.weight"])).sum(2) + out + stream


def by_hand(model: Any, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for index, layer in enumerate(model.model.layers):

        def forward(hidden_states: Tensor, layer: Any = layer, index: int = index, **kwargs: Any) -> Tensor:
            kwargs.pop("past_key_values", None)
            stem = f"model.layers.{index}"
            out = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)[0]
            middle = out + hidden_states
            if config["mh_adapter"]:
                middle = fuse(f"{stem}.attention_adapters", config, tensors, out, hidden_states)
            out = layer.mlp(layer.post_attention_layernorm(middle))
            return fuse(f"{stem}.output_adapters", config, tensors, out, middle)

        layer.forward = forward


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, tmp_path, adapted_logits):
    """What is fused is what the adapters compute before a norm of their own."""
    config = {**BN, **FORMS[form]}
    tensors = make_fusion(config, tmp_path)
    expected, base = make_model("llama"), make_model("llama")
    by_hand(expected, config, tensors)
    adapter = load_adapter(tmp_path, TorchBase(base))
    with torch.no_grad():
        wanted = expected(input_ids=IDS, use_cache=False).logits
        assert (wanted - base(input_ids=IDS).logits).abs().max() > 1e-2
    torch.testing.assert_close(adapted_logits(base, adapter, IDS), wanted, atol=2e-4, rtol=1e-4)


@pytest.fixture
def fusion(fixtures: Path, tmp_path: Path) -> Path:
    return shutil.copytree(fixtures / "adapterhub/llama/fusion", tmp_path / "fusion")


def head_of(folder: Path, base: TorchBase) -> Any:
    adapter = load_adapter(folder, base)
    assert adapter.parts.head is not None
    return adapter.parts.head


@pytest.mark.parametrize("places", [("fusion",), ("a",), ("a", "b"), ("fusion", "a")])
def test_one_head(places, fusion, fixtures, llama):
    for place in places:
        with_head(place)(fusion)
    stored = load_file(fixtures / "adapterhub/llama/pfeiffer_with_head/model_head.safetensors")
    assert torch.equal(head_of(fusion, llama).output.weight, stored["heads.a.4.weight"])


def test_the_fusions_own_head_goes_before_its_adapters(fusion, fixtures, llama):
    with_head("a")(fusion)
    with_head("b", -1.0)(fusion)
    with_head("fusion", 2.0, label2id={"x": 0, "y": 1, "z": 2})(fusion)
    stored = load_file(fixtures / "adapterhub/llama/pfeiffer_with_head/model_head.safetensors")
    head = head_of(fusion, llama)
    assert torch.equal(head.output.weight, 2 * stored["heads.a.4.weight"])
    assert head.labels == ("x", "y", "z")


def test_a_language_head_beside_the_fusion(fusion, llama, load_base, adapted_logits):
    """As the library saves it with a model that has one: the base's own has no effect, a trained one replaces it."""
    for name in ("head_config.json", "model_head.safetensors"):
        shutil.copy(fusion / "a" / name, fusion / "fusion" / name)
    expected = load_file(fusion / "expected.safetensors")
    logits = adapted_logits(load_base("llama"), load_adapter(fusion, llama), expected["input_ids"])
    torch.testing.assert_close(logits, expected["logits"], atol=5e-5, rtol=0)
    path = fusion / "fusion/model_head.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    logits = adapted_logits(load_base("llama"), load_adapter(fusion, llama), expected["input_ids"])
    torch.testing.assert_close(logits, 2 * expected["logits"], atol=1e-4, rtol=1e-4)


HOOKED: dict[str, tuple[str, dict[str, Any], str]] = {
    "as its own classes": ("pfeiffer_seq_bn", {}, ""),
    "reading the branch alone, no hook before": ("houlsby_double_seq_bn", {"layer_pre_ffn": None}, ""),
    "no hook before": ("pfeiffer_seq_bn", {"layer_pre_ffn": None}, "layer_pre_ffn"),
    "a hook elsewhere": ("parallel_par_bn", {"layer_pre_ffn": "mlp"}, "layer_pre_ffn"),
    "a norm after the branch": ("pfeiffer_seq_bn", {"layer_ln_2": "post_attention_layernorm"}, "layer_ln_2"),
}


@pytest.mark.parametrize("case", HOOKED)
def test_by_hooks(case, fixtures, llama, load_base, adapted_logits, tmp_path):
    name, hooks, refused = HOOKED[case]
    folder = shutil.copytree(fixtures / "adapterhub/llama" / name, tmp_path / "a")
    (folder / "adapter_interface.json").write_text(json.dumps({"interface": {**INTERFACE, **hooks}}))
    if refused:
        with pytest.raises(AdapterInvalid, match=f"field {refused} of adapter_interface.json"):
            load_adapter(folder, llama)
        return
    expected = load_file(folder / "expected.safetensors")
    logits = adapted_logits(load_base("llama"), load_adapter(folder, llama), expected["input_ids"])
    torch.testing.assert_close(logits, expected["logits"], atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("saved", "version", "meant"),
    [
        ("gelu", None, "gelu_new"),
        ("gelu_orig", None, "gelu"),
        ("gelu", "adapters.1.3.0", "gelu"),
        ("relu", None, "relu"),
    ],
)
def test_activations_before_files_said_their_version(saved, version, meant, fixtures, llama, tmp_path):
    folder = shutil.copytree(fixtures / "adapterhub/llama/pfeiffer_seq_bn", tmp_path / "a")
    inner(non_linearity=saved)(folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"version": version}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    (part,) = load_adapter(folder, llama).parts.others["model.layers.0.mlp"]
    assert part.activation == meant
