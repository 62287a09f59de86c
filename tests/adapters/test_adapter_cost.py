"""What adapters cost, from sizes known by hand."""

from __future__ import annotations

import pytest
import torch

from peftmux.adapters.cost import cost
from peftmux.adapters.lower import load_adapter

HIDDEN, KV, INNER, LAYERS = 32, 16, 64, 3


def lora_entries(rank: int) -> int:
    """Of A and B at the seven linear layers of every layer."""
    sizes = [(HIDDEN, HIDDEN)] * 2 + [(HIDDEN, KV)] * 2 + [(HIDDEN, INNER)] * 2 + [(INNER, HIDDEN)]
    return LAYERS * sum(rank * (a + b) for a, b in sizes)


@pytest.mark.parametrize(
    ("folder", "parts", "entries", "flops"),
    [
        ("lora", {"LinearPart": 21}, lora_entries(4), 2 * lora_entries(4)),
        ("ia3", {"LinearPart": 6, "InputScale": 3}, 3 * (INNER + 2 * KV), 3 * (INNER + 2 * KV)),
        ("prefix", {"KVPrefix": 1}, 5 * LAYERS * 2 * KV, 2 * 5 * LAYERS * 2 * KV),
        ("ln_tuning", {"NormPart": 7}, 7 * HIDDEN, 7 * HIDDEN),
    ],
)
def test_known_sizes(folder, parts, entries, flops, fixtures, llama):
    adapter = load_adapter(fixtures / "peft/llama" / folder, llama)
    for dtype in (torch.float32, torch.bfloat16):
        needed = cost(adapter, dtype)
        assert needed.parts == parts
        assert needed.size == entries * dtype.itemsize
        assert needed.flops == flops
