"""Tiny random models, and adapters on them as PEFT makes, saves and loads them."""

from __future__ import annotations

from typing import Any

import peft
import torch
import transformers

TINY: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GQA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
MODELS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **TINY
    ),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=24,
        init_std=0.2,
        **TINY,
    ),
    "llama": lambda: transformers.LlamaConfig(**GQA, **TINY),
    "phi": lambda: transformers.PhiConfig(**GQA, **TINY),
    "phi3": lambda: transformers.Phi3Config(**GQA, **TINY),
    "qwen3": lambda: transformers.Qwen3Config(**GQA, head_dim=16, tie_word_embeddings=True, **TINY),
    "qwen2": lambda: transformers.Qwen2Config(**GQA, **TINY),
    "qwen2_tied": lambda: transformers.Qwen2Config(**GQA, **TINY, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**GQA, head_dim=8, sliding_window=6, **TINY),
    "mixtral": lambda: transformers.MixtralConfig(**GQA, num_local_experts=4, **TINY),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **GQA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, **TINY
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **GQA, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"], **TINY
    ),
    "gemma2": lambda: transformers.Gemma2Config(**GQA, head_dim=8, **TINY),
}


def make_model(name: str) -> Any:
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name](), attn_implementation="eager").eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):  # random models start with zero biases, which would hide their handling
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def save(name: str, config: Any, folder: Any) -> None:
    """Make, randomise and save an adapter on model `name`."""
    tuned = peft.get_peft_model(make_model(name), config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter_name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.3
                parameter.copy_(noise if _starts_at_zero(parameter_name) else parameter + noise)
    tuned.save_pretrained(folder)


def _starts_at_zero(parameter: str) -> bool:
    """What is learned from nothing, rather than from the base's own values."""
    return "prompt" in parameter or ("lora" in parameter and "magnitude" not in parameter)


@torch.no_grad()
def logits_of(name: str, folder: Any, ids: torch.Tensor) -> torch.Tensor:
    """PEFT's own for the adapter in `folder`."""
    loaded = peft.PeftModel.from_pretrained(make_model(name), folder).eval()
    logits: torch.Tensor = loaded(input_ids=ids).logits
    return logits


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 6, **fields})
