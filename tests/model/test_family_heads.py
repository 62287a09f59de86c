"""Hidden states and PEFT's classifiers on other shapes than Llama's: other head names, widths, norms and pad tokens."""

from __future__ import annotations

import asyncio
import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from peftmux.adapters.torch_base import TorchBase
from peftmux.runtime.engine.api import ClassificationRequest, EmbeddingRequest, Pooling
from peftmux.runtime.engine.factory import EngineConfig, build_engine
from peftmux.runtime.engine.observer import NullObserver
from peftmux.runtime.model.load import fit_model
from tests.engine.harness import ask, check_quiet, load, request
from tests.model.families import SERVED, build, greedy
from tests.model.test_family_adapters import engine_for

PROMPTS = [[5, 9, 17, 33, 3, 7, 8, 60, 61, 62, 63, 64], [101, 44, 3], [7] * 21]
AUTO: dict[str, Any] = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}


@pytest.mark.parametrize("family", SERVED)
async def test_states_are_the_decoders(family: str) -> None:
    """Mean and last token of what the decoder under the causal model returns, prompts in chunks of one batch."""
    module = build(family)
    with torch.inference_mode():
        states = [module.base_model(input_ids=torch.tensor([p]), use_cache=False)[0][0].clone() for p in PROMPTS]
    width = TorchBase(module).state_width
    config = EngineConfig(model=family, max_batch_tokens=8, block_size=4, num_threads=1)
    fitted = fit_model(module, None, family)
    assert fitted.state_width == width == states[0].shape[-1]
    engine = build_engine(fitted, config, NullObserver())
    try:
        asked = [EmbeddingRequest(tuple(p), pooling=how) for p in PROMPTS for how in (Pooling.MEAN, Pooling.LAST)]
        got = await asyncio.gather(*(engine.embed(one) for one in asked))
        for i, of_prompt in enumerate(states):
            for answer, expected in zip(got[2 * i :], (of_prompt.mean(0), of_prompt[-1]), strict=False):
                values = torch.tensor(answer.values)
                torch.testing.assert_close(values, expected, rtol=0, atol=1e-3 * float(of_prompt.std()))
        await check_quiet(engine)
    finally:
        await engine.drain(0.0)


def save_classifier(family: str, task: str, config: Any, labels: int, folder: Path) -> Any:
    """A random adapter with a head on the family's own backbone, in PEFT's files; returns the model that PEFT runs."""
    causal = build(family)
    classes = copy.deepcopy(causal.config)
    classes.num_labels = labels
    module = AUTO[task].from_config(classes, attn_implementation="eager").eval()
    module.base_model.load_state_dict(causal.base_model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = get_peft_model(module, config)
    torch.manual_seed(11)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(str(folder))
    return adapted.eval()


def lora(task: str, **fields: Any) -> LoraConfig:
    return LoraConfig(r=3, lora_alpha=6, task_type=task, **fields)


CLASSIFIERS: dict[str, tuple[str, str, Any]] = {
    "gpt2-sequence": ("gpt2", "SEQ_CLS", lora("SEQ_CLS", target_modules=["c_attn"], fan_in_fan_out=True)),
    "gpt2-token": ("gpt2", "TOKEN_CLS", lora("TOKEN_CLS", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "qwen2-all-linear": ("qwen2", "SEQ_CLS", lora("SEQ_CLS", target_modules="all-linear")),
    "qwen2-embedding": ("qwen2", "TOKEN_CLS", lora("TOKEN_CLS", target_modules=["embed_tokens", "v_proj"])),
    "qwen2-tokens": (
        "qwen2",
        "SEQ_CLS",
        lora("SEQ_CLS", target_modules=["v_proj"], trainable_token_indices=[5, 7, 101]),
    ),
    "gpt2-tied-tokens": (
        "gpt2",
        "SEQ_CLS",
        lora("SEQ_CLS", target_modules=["c_attn"], fan_in_fan_out=True, trainable_token_indices={"wte": [5, 101]}),
    ),
    "opt-narrow": ("opt", "SEQ_CLS", lora("SEQ_CLS", target_modules=["q_proj", "fc1"])),
    "gemma2": ("gemma2", "TOKEN_CLS", lora("TOKEN_CLS", target_modules=["o_proj"])),
    "gpt_neox": ("gpt_neox", "TOKEN_CLS", lora("TOKEN_CLS", target_modules=["query_key_value"])),
    "mistral-prefix": ("mistral", "SEQ_CLS", PrefixTuningConfig(num_virtual_tokens=5, task_type="SEQ_CLS")),
    "qwen3-prompt": ("qwen3", "SEQ_CLS", PromptTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS")),
    "llama-p-tuning": (
        "llama",
        "SEQ_CLS",
        PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=24, task_type="SEQ_CLS"),
    ),
    "qwen2-biases": ("qwen2", "TOKEN_CLS", lora("TOKEN_CLS", target_modules=["q_proj"], bias="all")),
    "qwen3-prefix": ("qwen3", "TOKEN_CLS", PrefixTuningConfig(num_virtual_tokens=3, task_type="TOKEN_CLS")),
}


@pytest.mark.parametrize("case", CLASSIFIERS)
async def test_classifier_is_exact_beside_other_rows(case: str, tmp_path: Path) -> None:
    """Two heads of different label counts, rows of the base that generate, in one batch of small steps."""
    family, task, config = CLASSIFIERS[case]
    many = save_classifier(family, task, config, 5, tmp_path / "many")
    one = save_classifier(family, task, config, 1, tmp_path / "one")
    prompts = [*PROMPTS, [*PROMPTS[0], 0, 0], [0, 9, 0, 4, 0]]
    base = build(family)
    expected_tokens = greedy(base, PROMPTS[0], 6)
    async with engine_for(family, tmp_path) as engine:
        await load(engine, "many")
        await load(engine, "one")
        asked = [ClassificationRequest(tuple(p), name) for name in ("many", "one") for p in prompts]
        generating = asyncio.gather(*(ask(engine, request(PROMPTS[0], "", 6)) for _ in range(3)))
        got = await asyncio.gather(*(engine.classify(each) for each in asked))
        assert [answer.ids for answer in await generating] == [expected_tokens] * 3
        for answer, each in zip(got, asked, strict=True):
            logits = torch.tensor(answer.logits)
            expected = peft_logits(many if each.adapter == "many" else one, each.prompt)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)
            assert answer.usage.prompt_tokens == len(each.prompt)
        await check_quiet(engine, engine.stats().kv_cache_usage)


@torch.inference_mode()
def peft_logits(adapted: PeftModel, ids: tuple[int, ...]) -> torch.Tensor:
    logits: torch.Tensor = adapted(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)
    ).logits
    return logits[0] if logits.ndim == 3 else logits


async def test_labels_of_the_config_name_the_rows(tmp_path: Path) -> None:
    adapted = save_classifier("qwen2", "SEQ_CLS", lora("SEQ_CLS", target_modules=["q_proj"]), 2, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": {"0": "ham", "1": "spam"}}))
    async with engine_for("qwen2", tmp_path) as engine:
        await load(engine, "a")
        answer = await engine.classify(ClassificationRequest(tuple(PROMPTS[0]), "a"))
        assert answer.names == ("ham", "spam")
        assert answer.labels == (answer.names[int(peft_logits(adapted, tuple(PROMPTS[0])).argmax())],)
