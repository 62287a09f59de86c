"""Every folder that PEFT saved computes what PEFT computed, or is refused naming what is in the way."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from peftmux.adapters.errors import AdapterInvalid
from peftmux.adapters.lower import load_adapter
from peftmux.adapters.torch_base import TorchBase
from tests.folders import CLASSIFIES, GENERATES, HALF, PIECES, REFUSED, TASKS


@pytest.mark.parametrize("name", GENERATES)
def test_served_folder_computes_the_expected_logits(name, fixtures, load_base, adapted_logits):
    module = load_base(name.split("/")[1])
    adapter = load_adapter(fixtures / name, TorchBase(module))
    expected = load_file(fixtures / name / "expected.safetensors")
    logits = adapted_logits(module, adapter, expected["input_ids"], TASKS.get(name, ()))
    assert adapter.kind == GENERATES[name]
    torch.testing.assert_close(logits, expected["logits"], atol=5e-5, rtol=0)
    base_logits = module(input_ids=expected["input_ids"]).logits
    assert (base_logits - expected["logits"][:, -base_logits.shape[1] :]).abs().max() > 0.1, (
        "the adapter would be invisible"
    )


@pytest.mark.parametrize("name", HALF)
def test_bfloat16_base_rounds_as_peft_does(name, fixtures, load_base, adapted_logits):
    """Float32 parts, one rounding at each site: equal bit for bit where this was written.

    The tolerance is what another bfloat16 attention kernel alone does to these logits (0.26).
    """
    module = load_base("llama", torch.bfloat16)
    adapter = load_adapter(fixtures / name, TorchBase(module))
    expected = load_file(fixtures / name / "expected.safetensors")
    logits = adapted_logits(module, adapter, expected["input_ids"])
    assert adapter.kind == HALF[name]
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
    folders = {str(p.relative_to(fixtures)) for p in fixtures.glob("*/*/*") if p.is_dir() and p.parts[-3] != "base"}
    assert folders == {*GENERATES, *HALF, *CLASSIFIES, *REFUSED, *PIECES}


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
