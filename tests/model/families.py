"""Tiny random models of many families, as transformers builds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 199
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
}
_GPT2: dict[str, Any] = {"n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 256}
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "topk_group": 1,
}
_WINDOW: dict[str, Any] = {"sliding_window": 8}
_HEAD: dict[str, Any] = {"head_dim": 12}

SERVED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2, **_WINDOW},
    "qwen3": _HEAD,
    "mistral": _HEAD | _WINDOW,
    "gemma": _HEAD,
    "gemma2": _HEAD | _WINDOW | {"query_pre_attn_scalar": 12, "attn_logit_softcapping": 5.0},
    "gemma3_text": _HEAD | _WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi": {},
    "phi3": _WINDOW,
    "gpt2": _GPT2,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "num_key_value_heads": 4},
    "gpt_neox": {},
    "gpt_bigcode": _GPT2,
    "mixtral": _EXPERTS | {"sliding_window": None},
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS | _HEAD,
    "olmoe": _EXPERTS,
    "gpt_oss": _EXPERTS | _HEAD | _WINDOW | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "olmo": {},
    "olmo2": {},
    "cohere2": _WINDOW,
    "granite": {},
    "starcoder2": _WINDOW,
    "stablelm": {"hidden_size": 64},
    "smollm3": {},
    "glm": _HEAD,
    "exaone4": _WINDOW,
    "nemotron": _HEAD,
    "deepseek_v3": _EXPERTS | _LATENT | {"q_lora_rank": 16, "n_group": 2},
}
REFUSED: dict[str, dict[str, Any]] = {
    "gptj": _GPT2 | {"rotary_dim": 8},
    "bloom": {"n_layer": 4, "n_head": 4},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "mpt": {"d_model": 48, "n_layers": 4, "n_heads": 4, "max_seq_len": 256},
    "llama4_text": _EXPERTS | _HEAD | {"intermediate_size_mlp": 64, "attention_chunk_size": 16},
    "qwen3_next": _EXPERTS | _HEAD,
}


def build(family: str, **changes: Any) -> PreTrainedModel:
    """Random weights from a fixed seed, float32, eager attention."""
    config = AutoConfig.for_model(family, **(_COMMON | (SERVED | REFUSED)[family] | changes))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    module: PreTrainedModel = AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in module.named_parameters():
        if "sink" in name or parameter.dim() == 1:  # biases, norms and sinks that start at a constant prove nothing
            nn.init.normal_(parameter, mean=1.0 if "norm" in name and "bias" not in name else 0.0, std=0.3)
    return module


@torch.inference_mode()
def greedy(module: Any, prompt: list[int], count: int) -> list[int]:
    """By transformers' own `generate`, one prompt at a time."""
    ids = torch.tensor([prompt])
    out = module.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens
