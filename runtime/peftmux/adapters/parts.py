"""The small set of parts that every method lowers to. The engine knows these, never the methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from peftmux.kernels.lowrank import LinearPart

__all__ = ["KVPrefix", "LinearPart", "LoweredAdapter"]


@dataclass(frozen=True, slots=True)
class KVPrefix:
    """Keys and values that stand before a row's first token in every attention layer.

    keys[l]: [n, kv_heads_l, key_dim_l], values[l]: [n, kv_heads_l, value_dim_l], used as stored (never rotated).
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    first_position: int
    """Position id of the first real token: n in PEFT's files, 0 in AdapterHub's."""

    @property
    def length(self) -> int:
        return self.keys[0].shape[0]


@dataclass(frozen=True, slots=True)
class LoweredAdapter:
    """One adapter, ready to be placed on a device. Tensors are float32 on the CPU; the device chooses its dtype."""

    kind: str
    """As METHOD on the command line: "lora", "dora", "prefix", ..."""
    digest: str
    """sha256 (hex) of the content: canonical config and tensors."""
    linear: Mapping[str, LinearPart] = field(default_factory=dict)
    """By site name."""
    prefix: KVPrefix | None = None
    tensors: int = 0
    """Tensors in its files; lowering has used every one of them."""
    parameters: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def applied_sites(self) -> int:
        """Linear sites changed, plus one per attention layer with a prefix."""
        return len(self.linear) + (len(self.prefix.keys) if self.prefix else 0)

    @property
    def ranks(self) -> tuple[int, int]:
        """(smallest, largest) rank over the low-rank sites; (0, 0) where there are none."""
        ranks = [p.rank for p in self.linear.values() if p.rank]
        return (min(ranks), max(ranks)) if ranks else (0, 0)
