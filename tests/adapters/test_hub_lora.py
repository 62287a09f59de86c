"""AdapterHub's LoRA and IA3 against merged weights: which layers its fields name, and the scale of its versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from peftmux.adapters.convert import convert_adapter
from peftmux.adapters.errors import AdapterInvalid
from peftmux.adapters.lower import load_adapter
from peftmux.adapters.torch_base import TorchBase
from tests.adapters.peft_models import make_model
from tests.adapters.test_vocabulary_against_peft import IDS

INTERFACE = {
    "adapter_methods": ["bottleneck", "lora"],
    "attn_k_proj": "k_proj",
    "attn_o_proj": "o_proj",
    "attn_q_proj": "q_proj",
    "attn_qkv_proj": None,
    "attn_v_proj": "v_proj",
    "layer_intermediate_proj": "mlp.up_proj",
    "layer_ln_1": None,
    "layer_ln_2": None,
    "layer_output_proj": "mlp.down_proj",
    "layer_pre_ffn": "post_attention_layernorm",
    "layer_pre_self_attn": "input_layernorm",
    "layer_self_attn": "self_attn",
    "model_layers": "layers",
}
INTERMEDIATE = {"selfattn_lora": False, "intermediate_lora": True}
OUTPUT = {"selfattn_lora": False, "output_lora": True}
QV = ["self_attn.q_proj", "self_attn.v_proj"]
CASES: dict[str, tuple[str, dict[str, Any], list[str], bool]] = {
    "attention": ("llama", {}, QV, False),
    "attention by hooks": ("qwen3", {}, QV, True),
    "all of it": (
        "qwen3",
        {"attn_matrices": ["q", "k", "v"], "intermediate_lora": True, "output_lora": True},
        [*QV, "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"],
        True,
    ),
    "llama's intermediate is its down projection": ("llama", INTERMEDIATE, ["mlp.down_proj"], False),
    "llama's output is its up projection": ("llama", OUTPUT, ["mlp.up_proj"], False),
    "by hooks it is as they say": ("llama", INTERMEDIATE, ["mlp.up_proj"], True),
    "gpt2's intermediate": ("gpt2", INTERMEDIATE, ["mlp.c_fc"], False),
    "gpt2's output": ("gpt2", OUTPUT, ["mlp.c_proj"], False),
}


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], hooks: bool, version: str) -> None:
    whole = {"config": {"architecture": "lora", **config}, "name": "a", "version": version}
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    if hooks:
        (folder / "adapter_interface.json").write_text(json.dumps({"interface": INTERFACE, "version": version}))
    save_file(tensors, folder / "adapter.safetensors")


def make(model: Any, sites: list[str], rank: int, scales: bool = False) -> dict[str, Tensor]:
    generator, stem = torch.Generator().manual_seed(0), "transformer.h" if hasattr(model, "transformer") else ""
    tensors = {}
    for layer in range(2):
        for site in sites:
            path = f"{stem or 'model.layers'}.{layer}.{site}"
            weight = weight_of(model, path)
            tensors[f"{path}.loras.a.lora_B"] = 0.5 * torch.randn(weight.shape[0], rank, generator=generator)
            if not scales:
                tensors[f"{path}.loras.a.lora_A"] = 0.5 * torch.randn(rank, weight.shape[1], generator=generator)
    return tensors


def weight_of(model: Any, path: str) -> Tensor:
    """[out, in], a view."""
    module = model.get_submodule(path)
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data


def merge(model: Any, tensors: dict[str, Tensor], scale: float) -> None:
    for name in tensors:
        path, _, matrix = name.partition(".loras.a.lora_")
        if matrix == "B":
            weight_of(model, path).add_(scale * tensors[name] @ tensors[f"{path}.loras.a.lora_A"])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def check(folder: Path, base: Any, expected: Tensor, adapted_logits: Any) -> None:
    adapter = load_adapter(folder, TorchBase(base))
    assert (expected - logits(base)).abs().max() > 1e-2
    torch.testing.assert_close(adapted_logits(base, adapter, IDS), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_roles(case, tmp_path, adapted_logits):
    name, config, sites, hooks = CASES[case]
    merged, base = make_model(name), make_model(name)
    tensors = make(base, sites, 3)
    write(tmp_path, {"r": 3, "alpha": 6, **config}, tensors, hooks, "adapters.1.3.0")
    merge(merged, tensors, 2.0)
    check(tmp_path, base, logits(merged), adapted_logits)


@pytest.mark.parametrize(
    ("version", "scale"),
    [("adapters.1.3.0", 4.0), ("adapters.1.1.0", 4.0), ("adapters.1.0.1", 1.0), ("adapters.0.2.2", 1.0), ("4.0", 4.0)],
)
def test_scale(version, scale, tmp_path, adapted_logits):
    """Before 1.1 the library trained as if alpha were r, and wrote alpha."""
    merged, base = make_model("llama"), make_model("llama")
    tensors = make(base, QV, 2)
    write(tmp_path, {"r": 2, "alpha": 8}, tensors, False, version)
    merge(merged, tensors, scale)
    check(tmp_path, base, logits(merged), adapted_logits)


def test_ia3_scales_the_output_and_its_bias(tmp_path, adapted_logits):
    merged, base = make_model("gpt2"), make_model("gpt2")
    tensors = make(base, ["mlp.c_fc"], 1, scales=True)
    config = {**INTERMEDIATE, "r": 1, "alpha": 3, "composition_mode": "scale"}
    write(tmp_path, config, tensors, False, "adapters.1.3.0")
    for name, vector in tensors.items():
        module = merged.get_submodule(name.partition(".loras.")[0])
        module.weight.data.mul_(3 * vector.T)
        module.bias.data.mul_(3 * vector.flatten())
    check(tmp_path, base, logits(merged), adapted_logits)


def test_a_converted_folder_keeps_its_interface(tmp_path, adapted_logits):
    """Without it llama's roles would be others."""
    source, merged, base = tmp_path / "source", make_model("llama"), make_model("llama")
    source.mkdir()
    tensors = make(base, ["mlp.up_proj"], 2)
    write(source, {"r": 2, "alpha": 2, **INTERMEDIATE}, tensors, True, "adapters.1.3.0")
    (source / "adapter.safetensors").unlink()
    torch.save(tensors, source / "pytorch_adapter.bin")
    convert_adapter(source, tmp_path / "converted")
    merge(merged, tensors, 1.0)
    check(tmp_path / "converted", base, logits(merged), adapted_logits)


@pytest.mark.parametrize(
    ("hooks", "named"),
    [
        (None, "field interface of adapter_interface.json"),
        ({**INTERFACE, "attn_q_proj": 3}, "field attn_q_proj of adapter_interface.json"),
        ({**INTERFACE, "attn_q_proj": "query"}, "self_attn.q_proj"),
        ({**INTERFACE, "layer_self_attn": None}, "self_attn.q_proj"),
    ],
)
def test_interfaces_that_do_not_name_the_layers(hooks, named, tmp_path):
    write(tmp_path, {"r": 2}, make(make_model("llama"), QV, 2), False, "adapters.1.3.0")
    (tmp_path / "adapter_interface.json").write_text(json.dumps({"interface": hooks}))
    with pytest.raises(AdapterInvalid, match=named):
        load_adapter(tmp_path, TorchBase(make_model("llama")))


def test_a_fused_projection_is_refused(tmp_path):
    """The library adapts parts of it, each with an A of its own."""
    path = "transformer.h.{}.attn.c_attn.loras.a.lora_"
    tensors = {path.format(i) + "A": torch.ones(4, 32) for i in range(2)}
    tensors |= {path.format(i) + "B": torch.ones(64, 2) for i in range(2)}
    whole = {"config": {"architecture": "lora", "r": 2}, "name": "a", "version": "adapters.1.3.0"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(whole))
    (tmp_path / "adapter.safetensors").write_bytes(save(tensors))
    with pytest.raises(AdapterInvalid, match="c_attn"):
        load_adapter(tmp_path, TorchBase(make_model("gpt2")))
