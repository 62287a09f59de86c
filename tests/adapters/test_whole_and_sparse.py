"""Files of our own: partial freezing, BitFit, DiffPruning. The oracle is the base with its parameters changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftmux.adapters.errors import AdapterInvalid
from peftmux.adapters.lower import load_adapter, served_kinds
from peftmux.adapters.torch_base import TorchBase
from peftmux.adapters.writer import write_adapter
from tests.adapters.peft_models import make_model
from tests.adapters.test_vocabulary_against_peft import IDS

P = "base_model.model."
LAYERS = {
    "llama": ["model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.v_proj.weight", "model.norm.weight"],
    "gpt2": ["transformer.h.1.mlp.c_fc.weight", "transformer.h.0.attn.c_attn.bias", "transformer.ln_f.bias"],
    "opt": ["model.decoder.layers.1.fc1.weight", "model.decoder.layers.1.fc1.bias"],
    "qwen2": ["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "lm_head.weight"],
    "gemma3": ["model.layers.1.self_attn.q_norm.weight", "model.layers.0.mlp.gate_proj.weight"],
}


def changed(name: str, parameters: list[str]) -> tuple[Any, dict[str, Tensor]]:
    """The model with new values in these parameters, and the values. Parameters that are tied stay tied."""
    model, generator = make_model(name), torch.Generator().manual_seed(1)
    new = {}
    for path in parameters:
        parameter = model.get_parameter(path)
        parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape, generator=generator)
        new[path] = parameter.data.clone()
    return model, new


def check(name: str, expected: Any, folder: Path, adapted_logits: Any) -> Any:
    base = make_model(name)
    adapter = load_adapter(folder, TorchBase(base))
    with torch.no_grad():
        wanted = expected(input_ids=IDS).logits
        assert (wanted - base(input_ids=IDS).logits).abs().max() > 1e-2
    torch.testing.assert_close(adapted_logits(base, adapter, IDS), wanted, atol=1e-4, rtol=1e-4)
    return adapter


@pytest.mark.parametrize("name", LAYERS)
def test_whole_layers(name, tmp_path, adapted_logits):
    model, new = changed(name, LAYERS[name])
    write_adapter(tmp_path, {"peft_type": "LAYERS", "task_type": "CAUSAL_LM"}, {P + k: v for k, v in new.items()})
    assert check(name, model, tmp_path, adapted_logits).kind == "layers"


@pytest.mark.parametrize("name", ["gpt2", "opt", "phi", "qwen2"])
@pytest.mark.parametrize("terms", ["all", "query_intermediate"])
def test_bitfit(name, terms, tmp_path, adapted_logits):
    paths = [n for n, _ in make_model(name).named_parameters() if n.endswith(".bias")]
    if terms != "all":
        paths = [n for n in paths if n.removesuffix(".bias").endswith(("q_proj", "c_attn", "fc1", "c_fc"))]
    model, new = changed(name, paths)
    config = {"peft_type": "BITFIT", "bias_terms": terms, "task_type": "CAUSAL_LM"}
    write_adapter(tmp_path, config, {P + k: v for k, v in new.items()})
    assert check(name, model, tmp_path, adapted_logits).kind == "bitfit"


def test_bitfit_is_offered_where_there_are_biases():
    assert "bitfit" in served_kinds(TorchBase(make_model("gpt2")))
    assert "bitfit" not in served_kinds(TorchBase(make_model("llama")))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_diffpruning(name, tmp_path, adapted_logits):
    site = {"llama": "model.layers.0.self_attn.q_proj", "gpt2": "transformer.h.0.mlp.c_fc"}.get(
        name, "model.decoder.layers.0.fc2"
    )
    model = make_model(name)
    layer = model.get_submodule(site)
    weight = layer.weight.data.t() if name == "gpt2" else layer.weight.data  # [out, in]
    flat = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(2))[:90]
    indices = torch.stack([flat // weight.shape[1], flat % weight.shape[1]])
    values = torch.randn(90, generator=torch.Generator().manual_seed(3))
    weight[indices[0], indices[1]] += values
    tensors = {f"{P}{site}.diff_values": values, f"{P}{site}.diff_indices": indices.int()}
    if name != "llama":
        tensors[f"{P}{site}.bias_diff"] = torch.randn(weight.shape[0], generator=torch.Generator().manual_seed(4))
        layer.bias.data += tensors[f"{P}{site}.bias_diff"]
    config = {"peft_type": "DIFFPRUNING", "task_type": "CAUSAL_LM", "target_modules": [site]}
    write_adapter(tmp_path, config, tensors)
    assert check(name, model, tmp_path, adapted_logits).kind == "diffpruning"


Q = f"{P}model.layers.0.self_attn.q_proj"
Edit = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
BROKEN: dict[str, tuple[dict[str, Any], Edit, str, str]] = {
    "layers: a shape": (
        {"peft_type": "LAYERS"},
        lambda t: {f"{Q}.weight": torch.ones(3, 32)},
        "SHAPE_MISMATCH",
        "q_proj",
    ),
    "layers: no such module": (
        {"peft_type": "LAYERS"},
        lambda t: {f"{P}model.layers.9.mlp.up_proj.weight": torch.ones(3, 32)},
        "UNKNOWN_SITE",
        "layers.9",
    ),
    "layers: no such bias": (
        {"peft_type": "LAYERS"},
        lambda t: {f"{Q}.bias": torch.ones(32)},
        "UNSUPPORTED_SITE",
        "bias",
    ),
    "layers: not finite": (
        {"peft_type": "LAYERS"},
        lambda t: {f"{Q}.weight": torch.full((32, 32), torch.nan)},
        "NOT_FINITE",
        "q_proj.weight",
    ),
    "layers: other modules named": (
        {"peft_type": "LAYERS", "target_modules": ["model.norm"]},
        lambda t: {f"{Q}.weight": torch.ones(32, 32)},
        "INVALID_FIELD",
        "target_modules",
    ),
    "bitfit: a weight": (
        {"peft_type": "BITFIT"},
        lambda t: {f"{Q}.weight": torch.ones(32, 32)},
        "UNSUPPORTED_SITE",
        "q_proj",
    ),
    "bitfit: terms": (
        {"peft_type": "BITFIT", "bias_terms": "some"},
        lambda t: {f"{Q}.bias": torch.ones(32)},
        "INVALID_FIELD",
        "bias_terms",
    ),
    "diff: outside": (
        {},
        lambda t: {**t, f"{Q}.diff_indices": torch.tensor([[0, 32], [0, 1]]).int()},
        "INVALID_INDICES",
        "0 to 31",
    ),
    "diff: negative": (
        {},
        lambda t: {**t, f"{Q}.diff_indices": torch.tensor([[0, -1], [0, 1]]).int()},
        "INVALID_INDICES",
        "-1",
    ),
    "diff: twice": (
        {},
        lambda t: {**t, f"{Q}.diff_indices": torch.tensor([[1, 1], [2, 2]]).int()},
        "INVALID_INDICES",
        "once",
    ),
    "diff: counts": (
        {},
        lambda t: {**t, f"{Q}.diff_indices": torch.tensor([[1], [2]]).int()},
        "SHAPE_MISMATCH",
        "diff_indices",
    ),
    "diff: indices are floats": (
        {},
        lambda t: {**t, f"{Q}.diff_indices": torch.ones(2, 2)},
        "UNSUPPORTED_DTYPE",
        "I32",
    ),
    "diff: values are integers": (
        {},
        lambda t: {**t, f"{Q}.diff_values": torch.ones(2).int()},
        "UNSUPPORTED_DTYPE",
        "F32",
    ),
    "diff: a bias too many": ({}, lambda t: {**t, f"{Q}.bias_diff": torch.ones(32)}, "UNUSED_TENSOR", "bias_diff"),
    "diff: a field": ({"weight_scale": 2}, lambda t: t, "UNSUPPORTED_FIELD", "weight_scale"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused(case, tmp_path):
    config, edit, reason, named = BROKEN[case]
    tensors = {f"{Q}.diff_values": torch.ones(2), f"{Q}.diff_indices": torch.tensor([[0, 3], [1, 2]]).int()}
    targets = [Q.removeprefix(P)] if "peft_type" not in config else None
    whole = {"peft_type": "DIFFPRUNING", "task_type": "CAUSAL_LM", "target_modules": targets, **config}
    write_adapter(tmp_path, whole, edit(tensors))
    with pytest.raises(AdapterInvalid) as refusal:
        load_adapter(tmp_path, TorchBase(make_model("llama")))
    assert refusal.value.reason == reason
    assert named in str(refusal.value)


def without(folder: Path, tensor: str) -> AdapterInvalid:
    """The refusal of the folder once it has lost a tensor."""
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors[tensor]
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterInvalid) as refusal:
        load_adapter(folder, TorchBase(make_model("gpt2")))
    return refusal.value


def biases_of(modules: Iterable[str]) -> dict[str, Tensor]:
    model = make_model("gpt2")
    return {f"{P}{module}.bias": model.get_submodule(module).bias.data + 1 for module in modules}


@pytest.mark.parametrize("terms", ["all", "query_intermediate"])
def test_a_bias_that_the_config_names_is_missing(terms, tmp_path):
    modules = [n.removesuffix(".bias") for n, _ in make_model("gpt2").named_parameters() if n.endswith(".bias")]
    if terms != "all":
        modules = [module for module in modules if module.endswith(("c_attn", "c_fc"))]
    write_adapter(tmp_path, {"peft_type": "BITFIT", "bias_terms": terms}, biases_of(modules))
    refusal = without(tmp_path, f"{P}transformer.h.0.mlp.c_fc.bias")
    assert refusal.reason == "MISSING_TENSOR"
    assert "h.0.mlp.c_fc.bias" in str(refusal)


def test_biases_alone_say_themselves_which_they_are(tmp_path):
    write_adapter(tmp_path, {"peft_type": "BITFIT"}, biases_of(["transformer.h.0.mlp.c_fc"]))
    assert "bias_terms is unset" in load_adapter(tmp_path, TorchBase(make_model("gpt2"))).warnings[0]


def test_a_listed_module_lacks_a_parameter(tmp_path):
    norm = make_model("gpt2").transformer.ln_f
    tensors = {f"{P}transformer.ln_f.{name}": value.data for name, value in norm.named_parameters()}
    write_adapter(tmp_path, {"peft_type": "LAYERS", "target_modules": ["transformer.ln_f"]}, tensors)
    assert without(tmp_path, f"{P}transformer.ln_f.bias").reason == "MISSING_TENSOR"


@pytest.mark.parametrize(("declared", "layers"), [(True, 1), (False, 2)])
def test_a_difference_of_a_bias_is_missing(declared, layers, tmp_path):
    tensors = {}
    for layer in range(layers):
        stem = f"{P}transformer.h.{layer}.mlp.c_fc"
        width = make_model("gpt2").get_submodule(stem.removeprefix(P)).nf
        tensors |= {f"{stem}.diff_values": torch.ones(1), f"{stem}.diff_indices": torch.zeros(2, 1).int()}
        tensors[f"{stem}.bias_diff"] = torch.ones(width)
    places = [f"transformer.h.{layer}.mlp.c_fc" for layer in range(layers)]
    write_adapter(tmp_path, {"peft_type": "DIFFPRUNING", "target_modules": places, "bias": declared}, tensors)
    refusal = without(tmp_path, f"{P}transformer.h.0.mlp.c_fc.bias_diff")
    assert refusal.reason == "MISSING_TENSOR"
    assert "bias_diff" in str(refusal)
