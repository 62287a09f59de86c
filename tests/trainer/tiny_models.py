"""Tiny random bases of several shapes, with a byte-level tokenizer that has a chat template."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from peftmux.trainer.data import Example, PaddingCollator

SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON: dict[str, Any] = {
    "vocab_size": 260,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
    "hidden_size": 32,
    **SPECIAL,
}
HEADS: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
LAYERS = ["sliding_attention", "full_attention"]
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**COMMON, **HEADS),
    "llama-biased": LlamaConfig(**COMMON, **HEADS, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**COMMON, **HEADS, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=260, n_layer=2, n_embd=32, n_head=4, n_positions=128, initializer_range=0.2, **SPECIAL
    ),
    "phi3": Phi3Config(**COMMON, **HEADS),
    "opt": OPTConfig(
        **{**COMMON, "init_std": 0.2},
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_attention_heads=4,
        max_position_embeddings=128,
    ),
    "mistral": MistralConfig(**COMMON, **HEADS, sliding_window=8),
    "qwen3": Qwen3Config(**COMMON, **HEADS, head_dim=8),
    "mixtral": MixtralConfig(**COMMON, **HEADS, num_local_experts=3),
    "gemma3": Gemma3TextConfig(
        **COMMON, **HEADS, head_dim=8, sliding_window=8, query_pre_attn_scalar=8, layer_types=LAYERS
    ),
    "gemma2": Gemma2Config(**COMMON, **HEADS, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_model(shape: str, dtype: torch.dtype = torch.float32) -> Any:
    """A base in evaluation mode; biases are random too, so that tests see them. The same for every call."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[shape])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.to(dtype).eval()


def build_tokenizer() -> Any:
    """One token per byte; 0 <pad>, 1 <|im_start|>, 2 <|im_end|> (the end of a sequence), 3 </s>."""
    special = ["<pad>", "<|im_start|>", "<|im_end|>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "</s>"],
    )
    fast.chat_template = TEMPLATE
    return fast


def save_base(folder: Path, shape: str, dtype: torch.dtype = torch.float32) -> Path:
    """A folder that from_pretrained loads, with the tokenizer."""
    build_model(shape, dtype).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def teach(model: Any, rows: list[dict[str, str]], steps: int = 250) -> None:
    """Full training on {prompt, completion} rows, until the model does what they ask."""
    tokenizer, draw = build_tokenizer(), random.Random(0)
    ids = [(tokenizer(r["prompt"])["input_ids"], tokenizer(r["completion"])["input_ids"] + [2]) for r in rows]
    examples = [Example(p + c, [-100] * len(p) + c).feature() for p, c in ids]
    collate = PaddingCollator(crop_logits=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        model(**collate(draw.sample(examples, 32))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def copy_task(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompts of two letters whose completion is the same two in capitals: learned in some dozen steps."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdef", k=2)) for _ in range(count)]
    return [{"prompt": f"{w}=", "completion": w.upper()} for w in words]


def random_ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(4, 260, (rows, length), generator=torch.Generator().manual_seed(5))


def scramble(adapter: Any, seed: int = 3) -> None:
    """Random values for everything trainable, so that no tensor is zero and every one is seen in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
