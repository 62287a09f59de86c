"""Checkpoints in forms of others: taken as they are, made plain or refused by name; never read as what they are not."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GptOssConfig

from peftmux.adapters import quantised
from peftmux.adapters.checkpoint import UnusableCheckpoint, load_checkpoint
from peftmux.adapters.stored import strange_weights
from peftmux.runtime.errors import UnsupportedModel
from peftmux.runtime.model.load import load_model

LLAMA = Path(__file__).parents[1] / "fixtures" / "base" / "llama"
BLOCK = 16


def rewritten(folder: Path, quantization: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> str:
    """The fixture base with this quantization_config in its config, and other tensors."""
    folder.mkdir(exist_ok=True)
    config = json.loads((LLAMA / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    save_file(tensors or load_file(LLAMA / "model.safetensors"), folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
        ({"quant_method": "someone's"}, "someone's"),
        ({"bits": 3}, "None"),
        (
            {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_data": {}}}},
            "Int4WeightOnlyConfig",
        ),
    ],
)
def test_unknown_forms_are_refused_by_name(stored: dict[str, Any], named: str, tmp_path: Path) -> None:
    folder = rewritten(tmp_path / "base", stored)
    with pytest.raises(UnusableCheckpoint, match=named):
        load_checkpoint(folder)
    with pytest.raises(UnsupportedModel, match=named):
        load_model(folder, device=torch.device("cpu"))


def test_a_stored_form_is_not_made_another(tmp_path: Path) -> None:
    folder = rewritten(tmp_path / "base", {"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(UnusableCheckpoint, match="to make nf4 of, the checkpoint holds int8"):
        load_checkpoint(folder, quantization="nf4")


@pytest.mark.parametrize(("form", "extra"), [("fp8", "fp8"), ("nf4", "quant"), ("int8", "quant")])
def test_a_missing_library_is_named_with_its_extra(form: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = {"torchao", "bitsandbytes"}
    monkeypatch.setattr(quantised, "find_spec", lambda name: None if name in hidden else find_spec(name))
    with pytest.raises(ImportError, match=rf"peftmux\[{extra}\]"):
        load_checkpoint(str(LLAMA), quantization=form)
    with pytest.raises(UnsupportedModel, match=rf"peftmux\[{extra}\]"):
        load_model(str(LLAMA), device=torch.device("cpu"), quantization=form)


def test_block_wise_fp8_becomes_plain(tmp_path: Path) -> None:
    """DeepSeek's form: blocks of e4m3 with a scale each."""
    tensors, expected = load_file(LLAMA / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = codes.view(rows, columns), scales
        expected[name] = (codes.float() * scales[:, None, :, None]).view(rows, columns)
    stored = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    model: Any = load_checkpoint(rewritten(tmp_path / "base", stored, tensors), dtype=torch.float32)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    for name, weight in expected.items():
        torch.testing.assert_close(model.get_parameter(name).data, weight, rtol=0, atol=0)
    assert getattr(model.config, "quantization_config", None) is None, "it would not be merged into"


def test_mxfp4_experts_become_plain(tmp_path: Path) -> None:
    """gpt-oss's form: 32 e2m1 values, two a byte with the first in the low bits, to a power of two each."""
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention"],
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tensors, expected = load_file(tmp_path / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    half = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 128, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()
        values = torch.cat([half, -half])[codes] * torch.exp2(scales.float() - 127)[..., None]
        expected[name] = values.reshape(experts, rows, columns).transpose(1, 2)
    assert len(expected) == 2
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "quantization_config": {"quant_method": "mxfp4"}}))
    model: Any = load_checkpoint(str(tmp_path), dtype=torch.float32)
    for name, weight in expected.items():
        torch.testing.assert_close(model.get_parameter(name).data, weight, rtol=0, atol=0)


def test_weights_that_only_pretend_to_be_numbers_are_found() -> None:
    class Codes(torch.Tensor):
        pass

    layers = nn.ModuleDict({"whole": nn.Linear(4, 4), "short": nn.Linear(4, 4).half(), "codes": nn.Linear(4, 4)})
    assert strange_weights(layers) == []
    codes: Any = layers["codes"]
    codes.weight.data = codes.weight.data.to(torch.float8_e4m3fn)
    assert strange_weights(layers) == ["codes.weight"]
    codes.weight = nn.Parameter(torch.randn(4, 4).as_subclass(Codes))
    assert strange_weights(layers) == ["codes.weight"]


def test_a_base_that_has_nothing_to_quantise_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="needs torchao, which `peftmux[test]` brings on Linux")
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnusableCheckpoint, match="linear layers that can be held in fp8"):
        load_checkpoint(str(tmp_path), quantization="fp8")
