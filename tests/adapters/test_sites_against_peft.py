"""Methods at linear and normalisation layers: PEFT's logits from PEFT's files, on models of many shapes."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from peftmux.adapters.errors import AdapterInvalid
from peftmux.adapters.lower import load_adapter
from peftmux.adapters.torch_base import TorchBase
from tests.adapters.peft_models import MODELS, lora, make_model, save
from tests.adapters.test_vocabulary_against_peft import check

pytestmark = pytest.mark.filterwarnings("ignore")

ATTENTION = {"gpt2": ["c_attn"], "phi3": ["qkv_proj"]}
DOWN = {"gpt2": ["mlp.c_proj"], "opt": ["fc2"], "phi": ["fc2"], "mixtral": []}
NORMS = {
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "opt": ["self_attn_layer_norm", "final_layer_norm"],
    "phi": ["input_layernorm", "final_layernorm"],
}
LINEAR_ONLY = sorted(MODELS.keys() - {"gpt2"})


def attention(name: str) -> list[str]:
    return ATTENTION.get(name, ["q_proj", "v_proj"])


def task(kind: Any, **fields: Any) -> Any:
    return kind(task_type="CAUSAL_LM", **fields)


@pytest.mark.parametrize("name", MODELS)
def test_ia3(name, tmp_path, adapted_logits):
    down = DOWN.get(name, ["down_proj"])
    config = task(peft.IA3Config, target_modules=[*attention(name), *down], feedforward_modules=down)
    save(name, config, tmp_path)
    assert check(name, tmp_path, adapted_logits).kind == "ia3"


@pytest.mark.parametrize("name", ["llama", "phi3", "opt"])
def test_ia3_scales_the_input_that_siblings_share(name, tmp_path, adapted_logits):
    """Feed-forward modules may be any, also layers whose input other layers read unscaled."""
    target = {"phi3": ["gate_up_proj", "qkv_proj"], "opt": ["fc1", "k_proj"]}.get(name, ["up_proj", "k_proj", "v_proj"])
    save(name, task(peft.IA3Config, target_modules=target, feedforward_modules=target[:2]), tmp_path)
    check(name, tmp_path, adapted_logits)


@pytest.mark.parametrize("name", MODELS)
def test_ln_tuning(name, tmp_path, adapted_logits):
    """Gemma's norms scale by one more than their weight; some families norm queries and keys."""
    norms = NORMS.get(name, ["input_layernorm", "post_attention_layernorm", "norm"])
    norms = [*norms, "q_norm", "k_norm"] if name in ("qwen3", "qwen3_moe", "gemma3") else norms
    save(name, task(peft.LNTuningConfig, target_modules=norms), tmp_path)
    assert check(name, tmp_path, adapted_logits).kind == "ln"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("alpha", [6, 0])
def test_adalora(name, alpha, tmp_path, adapted_logits):
    fields = {"init_r": 6, "target_r": 3, "lora_alpha": alpha, "total_step": 10, "target_modules": attention(name)}
    save(name, task(peft.AdaLoraConfig, **fields), tmp_path)
    assert check(name, tmp_path, adapted_logits).kind == "adalora"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("saved", [True, False])
def test_vera(name, saved, tmp_path, adapted_logits):
    down = DOWN.get(name, ["down_proj"])
    fields = {"r": 5, "target_modules": [*attention(name), *down], "projection_prng_key": 9, "save_projection": saved}
    save(name, task(peft.VeraConfig, **fields), tmp_path)
    assert check(name, tmp_path, adapted_logits).kind == "vera"


@pytest.mark.parametrize("name", LINEAR_ONLY)
@pytest.mark.parametrize("r", [2, 7])
def test_loha(name, r, tmp_path, adapted_logits):
    save(name, task(peft.LoHaConfig, r=r, alpha=5, target_modules=attention(name)), tmp_path)
    assert check(name, tmp_path, adapted_logits).kind == "loha"


@pytest.mark.parametrize("name", ["llama", "phi3", "opt"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"decompose_both": True}, {"decompose_factor": 4}, {"decompose_both": True, "decompose_factor": 8, "r": 1}],
    ids=str,
)
def test_lokr(name, fields, tmp_path, adapted_logits):
    save(name, task(peft.LoKrConfig, **{"r": 2, "alpha": 5, "target_modules": attention(name), **fields}), tmp_path)
    assert check(name, tmp_path, adapted_logits).kind == "lokr"


@pytest.mark.parametrize("name", LINEAR_ONLY)
def test_shira(name, tmp_path, adapted_logits):
    save(name, task(peft.ShiraConfig, r=2, random_seed=4, target_modules=attention(name)), tmp_path)
    assert check(name, tmp_path, adapted_logits).kind == "shira"


@pytest.mark.parametrize("name", ["llama", "qwen2_tied", "gpt2", "opt"])
def test_trainable_tokens_alone(name, tmp_path, adapted_logits):
    target = "wte" if name == "gpt2" else "embed_tokens"
    save(name, task(peft.TrainableTokensConfig, token_indices=[4, 40, 9, 63], target_modules=[target]), tmp_path)
    ids = torch.tensor([[4, 9, 40, 63, 7, 4]])
    assert check(name, tmp_path, adapted_logits, ids).kind == "trainable-tokens"


@pytest.mark.parametrize("name", ["gpt2", "opt", "phi"])
def test_lora_with_every_bias(name, tmp_path, adapted_logits):
    """Those of normalisation layers too."""
    save(name, lora(target_modules=attention(name), bias="all"), tmp_path)
    check(name, tmp_path, adapted_logits)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (lambda: task(peft.OFTConfig, oft_block_size=8, target_modules=["q_proj"]), "OFT"),
        (lambda: task(peft.MissConfig, r=8, target_modules=["q_proj"]), "MISS"),
    ],
)
def test_methods_beyond_the_mission_are_refused_by_name(config, named, tmp_path):
    save("llama", config(), tmp_path)
    with pytest.raises(AdapterInvalid, match=named) as refusal:
        load_adapter(tmp_path, TorchBase(make_model("llama")))
    assert refusal.value.reason == "UNSUPPORTED_METHOD"


HEAD_CONFIGS = {
    "ia3": lambda names: task(peft.IA3Config, target_modules=names, feedforward_modules=[]),
    "adalora": lambda names: task(peft.AdaLoraConfig, target_modules=names, init_r=3, target_r=2, total_step=9),
    "vera": lambda names: task(peft.VeraConfig, target_modules=["lm_head"], r=3),
    "shira": lambda names: task(peft.ShiraConfig, target_modules=names, r=2),
    "loha": lambda names: task(peft.LoHaConfig, target_modules=names, r=2),
    "lokr": lambda names: task(peft.LoKrConfig, target_modules=names, r=2),
}


@pytest.mark.parametrize("method", HEAD_CONFIGS)
def test_the_output_projection(method, tmp_path, adapted_logits):
    """PEFT saves a copy of the base's weight beside it, which must be the base's."""
    save("llama", HEAD_CONFIGS[method](["q_proj", "lm_head"]), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (copy,) = [name for name in tensors if name.endswith("lm_head.base_layer.weight")]
    check("llama", tmp_path, adapted_logits)
    save_file({**tensors, copy: tensors[copy] + 1}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterInvalid, match="lm_head") as refusal:
        load_adapter(tmp_path, TorchBase(make_model("llama")))
    assert refusal.value.reason == "BASE_WEIGHT_DIFFERS"
