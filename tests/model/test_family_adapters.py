"""PEFT's adapters on other shapes than Llama's: packed and transposed projections, mixture experts, sliding windows."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    ShiraConfig,
    get_peft_model,
)
from torch import nn

from peftmux.adapters.errors import AdapterInvalid
from peftmux.runtime.engine.factory import EngineConfig, build_engine
from peftmux.runtime.engine.local import LocalEngine
from peftmux.runtime.engine.observer import NullObserver
from peftmux.runtime.model.load import fit_model
from tests.engine.harness import ask_all, check_quiet, load, request
from tests.model.families import build, greedy

PROMPTS = [[5, 9, 17, 33, 3, 7, 8, 60, 61, 62, 63, 64], [101, 44, 3]]
NEW_TOKENS = 8


TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **fields)


ADAPTERS: dict[str, tuple[str, PeftConfig]] = {
    "gpt2-packed-conv1d": ("gpt2", lora(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "gpt2-dora": ("gpt2", lora(target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)),
    "phi3-packed": ("phi3", lora(target_modules=["qkv_proj", "gate_up_proj"])),
    "opt": ("opt", lora(target_modules=["q_proj", "v_proj", "fc1", "fc2"])),
    "gpt_neox-packed": ("gpt_neox", lora(target_modules=["query_key_value", "dense_h_to_4h"])),
    "gemma2-all-linear": ("gemma2", lora(target_modules="all-linear")),
    "gemma3-one-of-three": ("gemma3_text", lora(target_modules=["k_proj", "up_proj"])),
    "llama-head": ("llama", lora(target_modules=["lm_head", "down_proj"])),
    "mixtral-attention": ("mixtral", lora(target_modules=["q_proj", "o_proj"])),
    "gpt2-ia3": (
        "gpt2",
        IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], **TASK),
    ),
    "llama-ia3-shared-input": (
        "llama",
        IA3Config(target_modules=["up_proj", "k_proj", "v_proj"], feedforward_modules=["up_proj", "k_proj"], **TASK),
    ),
    "gpt2-norms": ("gpt2", LNTuningConfig(target_modules=["ln_1", "ln_f"], **TASK)),
    "opt-norms": ("opt", LNTuningConfig(target_modules=["self_attn_layer_norm"], **TASK)),
    "gemma3-embedding": ("gemma3_text", lora(target_modules=["embed_tokens", "q_proj"])),
    "gemma3-embedding-dora": ("gemma3_text", lora(target_modules=["embed_tokens"], use_dora=True)),
    "gemma3-tokens": ("gemma3_text", lora(target_modules=["q_proj"], trainable_token_indices=[5, 44, 9])),
    "gemma3-saved": ("gemma3_text", lora(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "gemma3-norms": ("gemma3_text", LNTuningConfig(target_modules=["q_norm", "input_layernorm", "norm"], **TASK)),
    "opt-biases": ("opt", lora(target_modules=["q_proj"], bias="all")),
    "gemma2-sparse": ("gemma2", ShiraConfig(r=2, target_modules=["q_proj", "down_proj"], **TASK)),
    "phi3-kronecker": ("phi3", LoKrConfig(r=2, target_modules=["qkv_proj"], **TASK)),
    "qwen2-saved": ("qwen2", lora(target_modules=["q_proj"], modules_to_save=["k_proj", "o_proj"])),
    "gpt2-saved": ("gpt2", lora(target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["c_fc", "ln_2"])),
    "mistral-prefix": ("mistral", PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")),
    "gemma3-prefix": ("gemma3_text", PrefixTuningConfig(num_virtual_tokens=6, task_type="CAUSAL_LM")),
    "opt-prefix": ("opt", PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")),
}


def save_adapter(family: str, config: PeftConfig, folder: Path) -> Any:
    """A random adapter in PEFT's files; returns the model that PEFT runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = get_peft_model(build(family), config)
    generator = torch.Generator().manual_seed(2)
    for _, parameter in adapted.named_parameters():
        if parameter.requires_grad and not isinstance(config, PrefixTuningConfig):
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
    if isinstance(config, PrefixTuningConfig):
        nn.init.normal_(adapted.prompt_encoder["default"].embedding.weight, std=1.0)
    adapted.save_pretrained(str(folder))
    return adapted.eval()


@asynccontextmanager
async def engine_for(family: str, root: Path, **settings: Any) -> AsyncIterator[LocalEngine]:
    settings = {"max_batch_tokens": 8, "block_size": 4, "num_threads": 1, **settings}
    config = EngineConfig(model=family, adapters_root=str(root), **settings)
    engine = build_engine(fit_model(build(family), None, family), config, NullObserver())
    try:
        yield engine
    finally:
        await engine.drain(0.0)


@pytest.mark.parametrize("case", ADAPTERS)
async def test_adapter_and_base_rows_are_exact(case: str, tmp_path: Path) -> None:
    family, config = ADAPTERS[case]
    adapted = save_adapter(family, config, tmp_path / "a")
    base = build(family)
    expected = [greedy(adapted, p, NEW_TOKENS) for p in PROMPTS] + [greedy(base, p, NEW_TOKENS) for p in PROMPTS]
    assert expected[0] != expected[2], "the adapter is invisible"
    async with engine_for(family, tmp_path) as engine:
        await load(engine, "a")
        wanted = [request(p, name, NEW_TOKENS) for name in ("a", "") for p in PROMPTS]
        assert [answer.ids for answer in await ask_all(engine, wanted)] == expected
        await engine.unload_adapter("a")
        await check_quiet(engine)


async def test_an_adapter_of_another_family_is_refused(tmp_path: Path) -> None:
    save_adapter("opt", lora(target_modules=["fc1"]), tmp_path / "a")
    async with engine_for("llama", tmp_path) as engine:
        with pytest.raises(AdapterInvalid, match="expected"):
            await load(engine, "a")
