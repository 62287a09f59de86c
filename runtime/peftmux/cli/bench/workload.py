"""What is measured: a base model, requests, and adapters. All of it made here, from seeds."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from peftmux.adapters.writer import write_adapter

# name -> LlamaConfig's sizes
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "100m": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
_CONTEXT = 2048


@dataclass(frozen=True, slots=True)
class Job:
    """One greedy request that ignores end tokens, so that every engine makes the same number of tokens."""

    prompt: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts of 16 to 128 tokens, outputs of 32 to 96, uniform."""

    jobs: tuple[Job, ...]

    @property
    def new_tokens(self) -> int:
        return sum(job.new_tokens for job in self.jobs)

    @classmethod
    def draw(cls, count: int, vocab_size: int, seed: int = 0) -> Workload:
        chance = random.Random(seed)
        jobs = []
        for _ in range(count):
            prompt = tuple(chance.randrange(3, vocab_size) for _ in range(chance.randint(16, 128)))
            jobs.append(Job(prompt, chance.randint(32, 96)))
        return cls(tuple(jobs))

    def to_json(self) -> str:
        return json.dumps([asdict(job) for job in self.jobs])

    @classmethod
    def from_json(cls, text: str) -> Workload:
        return cls(tuple(Job(tuple(job["prompt"]), job["new_tokens"]) for job in json.loads(text)))


def save_random_model(size: str, dtype: str, folder: Path, seed: int = 0) -> None:
    """A Llama of random weights in a folder that transformers loads, its embeddings tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **RANDOM_MODELS[size],
        max_position_embeddings=_CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)


def save_random_loras(model: Path, root: Path, rank: int, names: Iterable[str]) -> None:
    """LoRA adapters on every linear layer but the head, in PEFT's files, different from each other."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    head = config.hidden_size // config.num_attention_heads
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * head
    shapes = {
        "self_attn.q_proj": (hidden, config.num_attention_heads * head),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (config.num_attention_heads * head, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(name.split(".")[1] for name in shapes),
    }
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(1000 + seed)
        tensors = {}
        for layer in range(config.num_hidden_layers):
            for module, (inputs, outputs) in shapes.items():
                key = f"base_model.model.model.layers.{layer}.{module}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * 0.02
                tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.02
        write_adapter(root / name, settings, {k: t.to(torch.bfloat16) for k, t in tensors.items()})
