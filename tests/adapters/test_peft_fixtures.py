"""Every folder that PEFT saved computes what PEFT computed, or is refused naming what is in the way."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from peftmux.adapters.errors import AdapterInvalid
from peftmux.adapters.lower import load_adapter
from peftmux.adapters.torch_base import TorchBase

SERVED = {
    "llama/lora": "lora",
    "llama/lora_alora": "lora",
    "llama/lora_embed": "lora",
    "llama/lora_embed_lmhead": "lora",
    "llama/lora_exclude": "lora",
    "llama/lora_layers_to_transform": "lora",
    "llama/lora_modules_to_save": "lora",
    "llama/lora_pissa": "lora",
    "llama/lora_rank_alpha_pattern": "lora",
    "llama/lora_rslora": "rslora",
    "llama/lora_trainable_tokens": "lora",
    "llama/lora_dora": "dora",
    "llama/lora_dora_embed": "dora",
    "llama/lora_dora_rslora": "dora",
    "llama/prefix": "prefix",
    "llama/prefix_projection": "prefix",
    "qwen2/lora": "lora",
    "qwen2/lora_alora": "lora",
    "qwen2/lora_bias_all": "lora",
    "qwen2/lora_bias_lora_only": "lora",
    "qwen2/lora_bias_term": "lora",
    "qwen2/lora_dora": "dora",
    "qwen2/lora_dora_embed_lmhead": "dora",
    "qwen2/lora_embed": "lora",
    "qwen2/lora_modules_to_save": "lora",
    "qwen2/lora_trainable_tokens": "lora",
    "qwen2/prefix": "prefix",
}
SERVED_BF16 = {"llama/lora.bf16base": "lora", "llama/lora_dora.bf16base": "dora"}
REFUSED = {
    "peft/llama/lora.seq_cls": ("UNSUPPORTED_TASK", "SEQ_CLS"),
    "peft/llama/prefix.seq_cls": ("UNSUPPORTED_TASK", "SEQ_CLS"),
    "peft/llama/lora_bdlora": ("UNSUPPORTED_FIELD", "use_bdlora"),
    "peft/llama/ia3": ("UNSUPPORTED_METHOD", "IA3"),
    "peft/llama/prompt_random": ("UNSUPPORTED_METHOD", "PROMPT_TUNING"),
    "adapterhub/llama/prefix_tuning_flat": ("PICKLE", "peftmux adapters convert"),
    "adapterhub/llama/pfeiffer_seq_bn": ("UNSUPPORTED_FORMAT", "AdapterHub"),
}


@pytest.mark.parametrize("name", SERVED)
def test_served_folder_computes_the_expected_logits(name, fixtures, load_base, adapted_logits):
    module = load_base(name.split("/")[0])
    adapter = load_adapter(fixtures / "peft" / name, TorchBase(module))
    expected = load_file(fixtures / "peft" / name / "expected.safetensors")
    logits = adapted_logits(module, adapter, expected["input_ids"])
    assert adapter.kind == SERVED[name]
    torch.testing.assert_close(logits, expected["logits"], atol=5e-5, rtol=0)
    base_logits = module(input_ids=expected["input_ids"]).logits
    assert (base_logits - expected["logits"]).abs().max() > 0.1, "the adapter would be invisible"


@pytest.mark.parametrize("name", SERVED_BF16)
def test_bfloat16_base_rounds_as_peft_does(name, fixtures, load_base, adapted_logits):
    """Float32 parts, one rounding at each site: equal bit for bit where this was written.

    The tolerance is what another bfloat16 attention kernel alone does to these logits (0.26).
    """
    module = load_base("llama", torch.bfloat16)
    adapter = load_adapter(fixtures / "peft" / name, TorchBase(module))
    expected = load_file(fixtures / "peft" / name / "expected.safetensors")
    logits = adapted_logits(module, adapter, expected["input_ids"])
    assert adapter.kind == SERVED_BF16[name]
    torch.testing.assert_close(logits.float(), expected["logits"], atol=0.3, rtol=0)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_folder_says_what_is_in_the_way(name, fixtures, llama):
    reason, named = REFUSED[name]
    with pytest.raises(AdapterInvalid) as refusal:
        load_adapter(fixtures / name, llama)
    assert refusal.value.reason == reason
    assert named in str(refusal.value)
    assert "expected" in str(refusal.value)


def test_no_fixture_is_left_out(fixtures):
    folders = {str(p.parent.relative_to(fixtures)) for p in fixtures.glob("*/*/*/adapter_config.json")}
    assert folders == {f"peft/{n}" for n in SERVED | SERVED_BF16} | set(REFUSED)


def test_lowered_counts_match_the_files(fixtures, llama):
    adapter = load_adapter(fixtures / "peft/llama/lora_rank_alpha_pattern", llama)
    stored = load_file(fixtures / "peft/llama/lora_rank_alpha_pattern/adapter_model.safetensors")
    assert adapter.tensors == len(stored) == 42
    assert adapter.parameters == sum(t.numel() for t in stored.values())
    assert adapter.applied_sites == 21
    assert adapter.ranks == (2, 8)
    for part in adapter.parts.linear.values():
        assert part.a is not None
        assert (part.a.dtype, part.a.device.type) == (torch.float32, "cpu")


def test_prefix_starts_its_rows_after_itself(fixtures, llama):
    prefix = load_adapter(fixtures / "peft/llama/prefix", llama).parts.prefix
    assert prefix is not None
    assert prefix.first_position == prefix.length == 5
    assert {tuple(k.shape) for k in prefix.keys + prefix.values} == {(5, 2, 8)}
