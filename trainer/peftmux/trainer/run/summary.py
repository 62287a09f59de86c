"""What would be trained, by place and in bytes."""

from __future__ import annotations

import re
from collections import Counter

from peftmux.trainer.methods import AttachedAdapter


def trainable_summary(adapter: AttachedAdapter, base_parameters: int) -> str:
    """One line per kind of place (layer numbers as *), then the total."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, size in adapter.sites().items():
        kind = re.sub(r"\b\d+\b", "*", name)
        counts[kind] += 1
        sizes[kind] += size
    width = max(map(len, sizes))
    lines = [f"  {kind:<{width}}  {counts[kind]:>4} places  {size:>12,}" for kind, size in sizes.items()]
    return "\n".join([f"{adapter.kind}:", *lines, *adapter.notes, trainable_parameters(adapter, base_parameters)])


def trainable_parameters(adapter: AttachedAdapter, base_parameters: int) -> str:
    total = sum(adapter.sites().values())
    return f"trainable parameters: {total:,} ({100 * total / base_parameters:.2f} % of {base_parameters:,})"
