"""Adapters that PEFT itself makes on other architectures: its logits are expected, its files are read."""

from __future__ import annotations

import json
from typing import Any

import peft
import pytest
import torch

from peftmux.adapters.errors import AdapterInvalid
from peftmux.adapters.lower import load_adapter
from peftmux.adapters.torch_base import TorchBase
from tests.adapters.peft_models import MODELS, logits_of, lora, make_model, save

pytestmark = pytest.mark.filterwarnings("ignore")

MIXTURES = {"mixtral", "qwen3_moe"}


def check(name: str, config: Any, folder: Any, adapted_logits: Any, tolerance: float = 1e-4) -> Any:
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    save(name, config, folder)
    expected = logits_of(name, folder, ids)
    model = make_model(name)
    adapter = load_adapter(folder, TorchBase(model))
    torch.testing.assert_close(adapted_logits(model, adapter, ids), expected, atol=tolerance, rtol=1e-4)
    with torch.no_grad():
        assert (model(input_ids=ids).logits - expected).abs().max() > 1e-2, "the adapter would be invisible"
    return adapter


@pytest.mark.parametrize("name", sorted(MODELS.keys() - MIXTURES))
@pytest.mark.parametrize(
    "fields",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}],
    ids=["lora", "rslora", "dora", "bias"],
)
def test_every_linear_layer(name, fields, tmp_path, adapted_logits):
    """Conv1D, the fused c_attn, packed qkv_proj and gate_up_proj, OPT's project_in and project_out are sites too."""
    adapter = check(name, lora(target_modules="all-linear", **fields), tmp_path, adapted_logits)
    assert "lm_head" not in adapter.parts.linear
    assert adapter.applied_sites == len(TorchBase(make_model(name)).linear_sites) - 1


@pytest.mark.parametrize("name", sorted(MIXTURES))
@pytest.mark.parametrize("use_dora", [False, True])
def test_attention_of_mixtures(name, use_dora, tmp_path, adapted_logits):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapter = check(name, lora(target_modules=targets, use_dora=use_dora), tmp_path, adapted_logits)
    assert adapter.applied_sites == 8


@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_experts(name, tmp_path, adapted_logits):
    """PEFT's "all-linear" reaches the experts' three-dimensional weights and the router."""
    adapter = check(name, lora(target_modules="all-linear"), tmp_path, adapted_logits)
    assert adapter.applied_sites == 2 * (4 + 3)
    assert adapter.ranks == (4, 8), "gate and up have both their ranks in one"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("projection", [False, True])
def test_prefix(name, projection, tmp_path, adapted_logits):
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=projection, encoder_hidden_size=8
    )
    adapter = check(name, config, tmp_path, adapted_logits)
    assert adapter.kind == "prefix"
    assert adapter.applied_sites == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r".*\.1\.(attn\.c_attn|mlp\.c_fc)"},
        {"target_modules": ["c_attn", "mlp.c_proj"], "layers_to_transform": 1},
        {"target_modules": ["c_proj"], "layers_to_transform": [0], "layers_pattern": "h"},
        {"target_modules": ["c_attn", "c_proj"], "exclude_modules": ["mlp.c_proj"]},
        {"target_modules": ["c_attn", "c_proj"], "exclude_modules": r".*\.0\..*"},
        {
            "target_modules": ["c_attn", "c_proj"],
            "rank_pattern": {"c_attn": 7, r"h\.0\..*": 2},
            "alpha_pattern": {"c_attn": 9},
        },
        {"target_modules": ["c_attn"], "rank_pattern": {"attn": 2, "h.1.attn.c_attn": 3}, "use_rslora": True},
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True},
        {"target_modules": ["lm_head", "c_attn"]},
        {"target_modules": ["transformer.h.0.attn.c_attn"], "bias": "lora_only"},
        {"target_modules": ["c_attn"], "bias": "lora_only", "use_dora": True},
        {"target_modules": ["c_attn"], "init_lora_weights": "gaussian", "lora_dropout": 0.1},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_peft_rules_on_gpt2(fields, tmp_path, adapted_logits):
    check("gpt2", lora(**fields), tmp_path, adapted_logits)


def test_patterns_that_saving_reordered_are_refused(tmp_path):
    """PEFT sorts a config's keys when it saves, so another pattern may win on load: its own load fails on shapes."""
    config = lora(target_modules=["c_attn"], rank_pattern={r"h\.0\..*": 2, "c_attn": 7})
    peft.get_peft_model(make_model("gpt2"), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterInvalid, match="expected rank 7 as the config says, got 2") as refusal:
        load_adapter(tmp_path, TorchBase(make_model("gpt2")))
    assert refusal.value.reason == "RANK_MISMATCH"


def test_bias_all_where_every_bias_is_a_linear_layers(tmp_path, adapted_logits):
    adapter = check("qwen2", lora(target_modules=["v_proj"], bias="all"), tmp_path, adapted_logits)
    untouched = [site for site, part in adapter.parts.linear.items() if part.a is None]
    assert len(untouched) == 4  # q_proj and k_proj of two layers: a new bias, no LoRA


def test_unconverted_pissa_is_refused_and_converted_is_plain_lora(tmp_path, adapted_logits):
    config = lora(target_modules=["c_attn"], init_lora_weights="pissa")
    tuned = peft.get_peft_model(make_model("gpt2"), config).eval()
    tuned.save_pretrained(tmp_path / "init")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.05) if parameter.requires_grad else None
    tuned.save_pretrained(tmp_path / "raw")
    base = TorchBase(make_model("gpt2"))
    with pytest.raises(AdapterInvalid, match=r"init_lora_weights.*path_initial_model_for_weight_conversion"):
        load_adapter(tmp_path / "raw", base)
    ids = torch.randint(3, 64, (1, 9), generator=torch.Generator().manual_seed(1))
    expected = tuned(input_ids=ids).logits
    tuned.save_pretrained(tmp_path / "done", path_initial_model_for_weight_conversion=tmp_path / "init")
    assert json.loads((tmp_path / "done/adapter_config.json").read_text())["r"] == 8
    adapter = load_adapter(tmp_path / "done", base)
    torch.testing.assert_close(adapted_logits(base.module, adapter, ids), expected, atol=1e-4, rtol=1e-4)
