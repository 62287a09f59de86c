"""What adapters cost, from sizes known by hand."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from peftmux.adapters.cost import cost
from peftmux.adapters.lower import load_adapter

HIDDEN, KV, INNER, LAYERS = 32, 16, 64, 3


def lora_entries(rank: int) -> int:
    """Of A and B at the seven linear layers of every layer."""
    sizes = [(HIDDEN, HIDDEN)] * 2 + [(HIDDEN, KV)] * 2 + [(HIDDEN, INNER)] * 2 + [(INNER, HIDDEN)]
    return LAYERS * sum(rank * (a + b) for a, b in sizes)


@pytest.mark.parametrize(
    ("folder", "parts", "flops", "virtual"),
    [
        ("lora", {"LinearPart": 21}, 2 * lora_entries(4), 0),
        ("ia3", {"LinearPart": 6, "InputScale": 3}, 3 * (INNER + 2 * KV), 0),
        ("prefix", {"KVPrefix": 1}, 0, 5),
        ("prompt_text", {"VirtualTokens": 1}, 0, 6),
        ("multitask_prompt", {"VirtualTokens": 1}, 0, 5),
        ("ln_tuning", {"NormPart": 7}, 7 * HIDDEN, 0),
    ],
)
def test_known_costs(folder, parts, flops, virtual, fixtures, llama):
    needed = cost(load_adapter(fixtures / "peft/llama" / folder, llama), torch.float32)
    assert (needed.parts, needed.flops, needed.virtual_tokens, needed.cache) == (parts, flops, virtual, 0)


def test_sparse_entries_are_multiplied_and_added(fixtures, llama):
    folder = fixtures / "peft/llama/shira"
    values = [t for name, t in load_file(folder / "adapter_model.safetensors").items() if t.is_floating_point()]
    assert cost(load_adapter(folder, llama), torch.float32).flops == 2 * sum(t.numel() for t in values)
