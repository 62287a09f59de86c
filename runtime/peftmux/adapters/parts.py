"""The small set of parts that every method lowers to. The engine knows these, never the methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from peftmux.kernels.embedding import EmbeddingPart
from peftmux.kernels.lowrank import LinearPart
from peftmux.kernels.rows import ReplacedRows

__all__ = ["EmbeddingPart", "KVPrefix", "LinearPart", "LoweredAdapter", "ReplacedRows"]


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
    rows: Mapping[str, ReplacedRows] = field(default_factory=dict)
    """By site name; they stand before the site's linear part."""
    embedding: EmbeddingPart | None = None
    prefix: KVPrefix | None = None
    invocation: tuple[int, ...] = ()
    """aLoRA: active from the last occurrence of these tokens in the prompt on, the base model without; () is always."""
    tensors: int = 0
    """Tensors in its files; lowering has used every one of them."""
    parameters: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def applied_sites(self) -> int:
        """Linear sites changed, the input embedding, and one per attention layer with a prefix."""
        sites = len(self.linear.keys() | self.rows.keys()) + (self.embedding is not None)
        return sites + (len(self.prefix.keys) if self.prefix else 0)

    @property
    def ranks(self) -> tuple[int, int]:
        """(smallest, largest) rank over the low-rank sites; (0, 0) where there are none."""
        ranks = [p.rank for p in self.linear.values() if p.rank]
        if self.embedding is not None and self.embedding.a is not None:
            ranks.append(self.embedding.a.shape[0])
        return (min(ranks), max(ranks)) if ranks else (0, 0)
