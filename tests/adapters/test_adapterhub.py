"""AdapterHub's forms of bottleneck against the library's own order of operations, and its folders' refusals."""

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
from tests.adapters.test_vocabulary_against_peft import IDS

BN: dict[str, Any] = {
    "mh_adapter": False,
    "output_adapter": True,
    "is_parallel": False,
    "original_ln_before": True,
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "ln_before": False,
    "ln_after": False,
    "non_linearity": "relu",
    "reduction_factor": 6,
    "scaling": 1.0,
    "leave_out": [],
    "use_gating": False,
    "inv_adapter": None,
    "cross_adapter": False,
    "phm_layer": False,
}
FORMS: dict[str, dict[str, Any]] = {
    "pfeiffer": {},
    "houlsby": {"mh_adapter": True, "original_ln_before": False, "non_linearity": "swish"},
    "parallel": {"is_parallel": True, "original_ln_before": False, "scaling": 4.0},
    "own residual": {"residual_before_ln": False, "original_ln_after": False, "non_linearity": "tanh"},
    "own residual of the branch": {"residual_before_ln": False, "original_ln_before": False, "mh_adapter": True},
    "learned scale": {"scaling": "learned", "non_linearity": "gelu"},
    "a scale for each channel": {"scaling": "channel", "is_parallel": True},
    "normed before": {"ln_before": True},
    "normed after": {"ln_after": True, "leave_out": [0]},
    "attention only": {"mh_adapter": True, "output_adapter": False, "original_ln_before": False},
}
LAYERS = {"llama": "model.layers", "qwen3": "model.layers", "gpt2": "transformer.h", "mixtral": "model.layers"}
BLOCKS = {"gpt2": ("attn", "mlp", "ln_1", "ln_2")}


def make(name: str, config: dict[str, Any], folder: Path, seed: int = 0) -> dict[str, Tensor]:
    """A folder as the library writes it, with random tensors."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return 0.5 * torch.randn(*shape, generator=generator)

    tensors = {}
    for layer in {0, 1} - set(config["leave_out"]):
        for place, on in (("attention", config["mh_adapter"]), ("output", config["output_adapter"])):
            if not on:
                continue
            stem = f"{LAYERS[name]}.{layer}.{place}_adapters.adapters.a."
            position = 0
            if config["ln_before"]:
                norm = {"weight": random(32) + 1, "bias": random(32)}
                position = 1
                for key, value in norm.items():
                    tensors[f"{stem}adapter_norm_before.{key}"] = value
                    tensors[f"{stem}adapter_down.0.{key}"] = value.clone()
            tensors[f"{stem}adapter_down.{position}.weight"] = random(5, 32)
            tensors[f"{stem}adapter_down.{position}.bias"] = random(5)
            tensors[f"{stem}adapter_up.weight"] = random(32, 5)
            tensors[f"{stem}adapter_up.bias"] = random(32)
            if config["ln_after"]:
                tensors[f"{stem}adapter_norm_after.weight"] = random(32)
                tensors[f"{stem}adapter_norm_after.bias"] = random(32)
            if config["scaling"] in ("learned", "channel"):
                tensors[f"{stem}scaling"] = random(1 if config["scaling"] == "learned" else 32)
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "adapter_config.json").write_text(
        json.dumps({"config": config, "name": "a", "version": "adapters.1.3.0"})
    )
    save_file(tensors, folder / "adapter.safetensors")
    return tensors


def by_hand(model: Any, name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The library's pre-forward, adapter and post-forward, step by step, in place of the branches' outputs."""
    activation: Any = {
        "relu": F.relu,
        "swish": F.silu,
        "tanh": torch.tanh,
        "gelu": F.gelu,
    }[config["non_linearity"]]

    def layer_norm(norm: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (32,), tensors[f"{norm}.weight"], tensors[f"{norm}.bias"])

    def adapter(stem: str, x: Tensor) -> Tensor:
        position = 0
        if config["ln_before"]:
            x = layer_norm(f"{stem}adapter_norm_before", x)
            position = 1
        down = F.linear(x, *(tensors[f"{stem}adapter_down.{position}.{n}"] for n in ("weight", "bias")))
        up = F.linear(activation(down), *(tensors[f"{stem}adapter_up.{n}"] for n in ("weight", "bias")))
        return up * (tensors[f"{stem}scaling"] if isinstance(config["scaling"], str) else config["scaling"])

    def normed(stem: str, x: Tensor) -> Tensor:
        if not config["ln_after"]:
            return x
        return layer_norm(f"{stem}adapter_norm_after", x)

    def whole(stem: str, out: Tensor, stream: Tensor) -> Tensor:
        if f"{stem}adapter_up.weight" not in tensors:
            return out + stream
        if config["is_parallel"]:
            result = normed(stem, adapter(stem, stream)) + out
        else:
            residual = out
            hidden = out + stream if config["original_ln_before"] else out
            if not config["residual_before_ln"]:
                residual = hidden
            result = normed(stem, adapter(stem, hidden)) + residual
        return result + stream if config["original_ln_after"] else result

    attention, mlp, first, second = BLOCKS.get(
        name, ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    )
    for index, layer in enumerate(model.get_submodule(LAYERS[name])):

        def forward(hidden_states: Tensor, *args: Any, layer: Any = layer, index: int = index, **kwargs: Any) -> Any:
            stem = f"{LAYERS[name]}.{index}."
            normed_input = getattr(layer, first)(hidden_states)
            kwargs.pop("past_key_values", None)
            if name == "gpt2":
                kwargs["attention_mask"] = args[1]
            out = getattr(layer, attention)(hidden_states=normed_input, **kwargs)[0]
            middle = whole(f"{stem}attention_adapters.adapters.a.", out, hidden_states)
            block = getattr(layer, mlp)(getattr(layer, second)(middle))
            return whole(f"{stem}output_adapters.adapters.a.", block, middle)

        layer.forward = forward


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("form", FORMS)
def test_forms(name, form, tmp_path, adapted_logits):
    config = {**BN, **FORMS[form]}
    tensors = make(name, config, tmp_path)
    expected, base = make_model(name), make_model(name)
    by_hand(expected, name, config, tensors)
    adapter = load_adapter(tmp_path, TorchBase(base))
    with torch.no_grad():
        wanted = expected(input_ids=IDS, use_cache=False).logits
        assert (wanted - base(input_ids=IDS).logits).abs().max() > 1e-2
    torch.testing.assert_close(adapted_logits(base, adapter, IDS), wanted, atol=2e-4, rtol=1e-4)


REFUSALS: dict[str, tuple[dict[str, Any], str, str]] = {
    "gating": ({"use_gating": True}, "UNSUPPORTED_FIELD", "use_gating"),
    "invertible": ({"inv_adapter": "nice"}, "UNSUPPORTED_FIELD", "inv_adapter"),
    "phm": ({"phm_layer": True}, "UNSUPPORTED_FIELD", "phm_layer"),
    "the residual twice": ({"residual_before_ln": False}, "UNSUPPORTED_FIELD", "original_ln_before"),
    "no residual": ({"original_ln_after": False}, "UNSUPPORTED_FIELD", "original_ln_after"),
    "an activation": ({"non_linearity": "maxout"}, "INVALID_FIELD", "non_linearity"),
    "nowhere": ({"output_adapter": False}, "NO_SITES", "mh_adapter"),
    "attention too": ({"mh_adapter": True}, "MISSING_TENSOR", "attention_adapters"),
    "a layer left out": ({"leave_out": [1]}, "UNUSED_TENSOR", "layers.1"),
    "a scale that is not there": ({"scaling": "learned"}, "MISSING_TENSOR", "scaling"),
    "another architecture": ({"architecture": "union"}, "UNSUPPORTED_METHOD", "prefix_tuning"),
    "an unknown field": ({"temperature": 3}, "UNSUPPORTED_FIELD", "temperature"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case, tmp_path):
    changed, reason, named = REFUSALS[case]
    make("llama", BN, tmp_path)
    whole = {"config": {**BN, **changed}, "name": "a"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(whole))
    with pytest.raises(AdapterInvalid) as refusal:
        load_adapter(tmp_path, TorchBase(make_model("llama")))
    assert refusal.value.reason == reason
    assert named in str(refusal.value)


@pytest.mark.parametrize("name", ["opt", "phi", "gemma2"])
def test_bases_of_another_form_are_refused(name, tmp_path):
    make("llama", BN, tmp_path)
    with pytest.raises(AdapterInvalid, match="bottleneck adapters are not served on") as refusal:
        load_adapter(tmp_path, TorchBase(make_model(name)))
    assert refusal.value.reason == "UNSUPPORTED_SITE"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda f: f.update(name="../a"), "MALFORMED_CONFIG"),
        (lambda f: f.update(name=None), "MALFORMED_CONFIG"),
        (lambda f: f.update(name="b"), "MISSING_TENSOR"),
    ],
)
def test_names(edit, reason, tmp_path):
    make("llama", BN, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    edit(config)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterInvalid) as refusal:
        load_adapter(tmp_path, TorchBase(make_model("llama")))
    assert refusal.value.reason == reason


def test_a_fusion_with_its_files_in_the_folder_itself(fixtures, llama, load_base, adapted_logits, tmp_path):
    source = fixtures / "adapterhub/llama/fusion"
    for name in ("a", "b"):
        shutil.copytree(source / name, tmp_path / name)
    for file in (source / "fusion").iterdir():
        shutil.copy(file, tmp_path)
    expected = load_file(source / "expected.safetensors")
    logits = adapted_logits(load_base("llama"), load_adapter(tmp_path, llama), expected["input_ids"])
    torch.testing.assert_close(logits, expected["logits"], atol=5e-5, rtol=0)


def test_a_fusion_without_one_of_its_adapters_is_refused(fixtures, llama, tmp_path):
    shutil.copytree(fixtures / "adapterhub/llama/fusion", tmp_path / "f")
    shutil.rmtree(tmp_path / "f/b")
    with pytest.raises(AdapterInvalid, match=r"b/adapter_config\.json"):
        load_adapter(tmp_path / "f", llama)


def test_a_trained_language_head_replaces_the_bases(fixtures, llama, load_base, adapted_logits, tmp_path):
    shutil.copytree(fixtures / "adapterhub/llama/pfeiffer_seq_bn", tmp_path / "a")
    head = load_file(tmp_path / "a/model_head.safetensors")
    changed = {name: 2 * tensor for name, tensor in head.items()}
    save_file(changed, tmp_path / "a/model_head.safetensors")
    expected = load_file(tmp_path / "a/expected.safetensors")
    logits = adapted_logits(load_base("llama"), load_adapter(tmp_path / "a", llama), expected["input_ids"])
    torch.testing.assert_close(logits, 2 * expected["logits"], atol=1e-4, rtol=1e-4)
