"""The small set of parts that every method lowers to. The engine knows these, never the methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from peftmux.kernels.bottleneck import Bottleneck, Fusion
from peftmux.kernels.embedding import EmbeddingPart
from peftmux.kernels.experts import ExpertsPart, RouterPart
from peftmux.kernels.head import Head
from peftmux.kernels.inputs import InputScale
from peftmux.kernels.ladder import Ladder
from peftmux.kernels.lowrank import LinearPart
from peftmux.kernels.mixture import MixturePart
from peftmux.kernels.norms import NormPart
from peftmux.kernels.routed import RoutedPart, ShareRule
from peftmux.kernels.rows import ReplacedRows
from peftmux.kernels.sparse import SparsePart
from peftmux.kernels.virtual import VirtualRows
from peftmux.kernels.vision import VisionPart

__all__ = [
    "FIRST_PASS",
    "IMAGES",
    "LADDER",
    "VIRTUAL_TOKENS",
    "Bottleneck",
    "ClassifierPart",
    "EmbeddingPart",
    "ExpertsPart",
    "Fusion",
    "Head",
    "InputScale",
    "KVPrefix",
    "Ladder",
    "LinearPart",
    "LoweredAdapter",
    "MixturePart",
    "NormPart",
    "Part",
    "Parts",
    "ReplacedRows",
    "RoutedPart",
    "RouterPart",
    "SparsePart",
    "TokenGroup",
    "VirtualRows",
    "VirtualTokens",
    "VisionPart",
]

FIRST_PASS = "(first pass)"
"""The place of a ClassifierPart."""
IMAGES = "(images)"
"""The place of a VisionPart."""
LADDER = "(ladder)"
"""The place of a Ladder."""
VIRTUAL_TOKENS = "(virtual tokens)"
"""The place of VirtualRows."""


@dataclass(frozen=True, slots=True)
class ClassifierPart:
    """Makes the shares of `RoutedPart`s of the base's last hidden state. layers: (weight, bias) of a perceptron."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    rule: ShareRule


Part = (
    ReplacedRows
    | InputScale
    | SparsePart
    | NormPart
    | EmbeddingPart
    | ExpertsPart
    | VirtualRows
    | RouterPart
    | MixturePart
    | RoutedPart
    | ClassifierPart
    | VisionPart
    | Bottleneck
    | Fusion
    | Ladder
)
"""What can sit at a named place of the base, beside the low-rank family's `LinearPart`."""


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
class VirtualTokens:
    """Vectors that stand before a row's first token as if they were the embeddings of tokens, at positions 0 .. n - 1.

    Attention is causal, so their keys and values are the same for every row and are computed once, when placed.
    """

    embeddings: Tensor
    """[prompts, n, D], fed to the model as its embedding layer's output: never scaled."""
    by_task: bool = False
    """Each prompt is a task's, and a request says which; otherwise there is one prompt."""

    @property
    def length(self) -> int:
        return self.embeddings.shape[1]

    @property
    def tasks(self) -> int:
        """How many tasks a request chooses from; 0 where it does not."""
        return self.embeddings.shape[0] if self.by_task else 0


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """Virtual tokens that stand together: rows of `VirtualRows`, in the order of the groups."""

    tokens: int
    at: int
    """k >= 0: before a prompt's k-th token, counted from 0; -1: after its last, -2: before its last, ..."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What one adapter is made of. Tensors are float32 on the CPU; the device chooses its dtype."""

    linear: Mapping[str, LinearPart] = field(default_factory=dict)
    """By the name of a linear site."""
    others: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)
    """By the name of the place they sit at, at most one of each type; at a linear site they stand before its linear
    part."""
    prefix: KVPrefix | None = None
    head: Head | None = None
    """Reads the final hidden states; such an adapter classifies, and generates nothing."""
    virtual: VirtualTokens | None = None
    """Instead of a prefix, which it becomes."""
    template: tuple[TokenGroup, ...] = ()
    """Where the virtual tokens of VIRTUAL_TOKENS stand in a request."""

    def placed(self) -> Iterator[tuple[str, LinearPart | Part]]:
        """Every part that sits at a named place, with the name."""
        yield from self.linear.items()
        for name, parts in self.others.items():
            for part in parts:
                yield name, part

    @property
    def places(self) -> frozenset[str]:
        """The names of the places that this adapter changes."""
        return frozenset((*self.linear, *self.others))


@dataclass(frozen=True, slots=True)
class LoweredAdapter:
    """One adapter, ready to be placed on a device."""

    kind: str
    """As METHOD on the command line: "lora", "dora", "prefix", ..."""
    digest: str
    """sha256 (hex) of the content: canonical config and tensors."""
    parts: Parts
    invocation: tuple[int, ...] = ()
    """aLoRA: active from the last occurrence of these tokens in the prompt on, the base model without; () is always."""
    tensors: int = 0
    """Tensors in its files; lowering has used every one of them."""
    parameters: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def applied_sites(self) -> int:
        """Places of the base that are changed, one for each attention layer with a prefix, and one each for virtual
        tokens and for a head."""
        parts = self.parts
        layers = len(parts.prefix.keys) if parts.prefix else 0
        return len(parts.places) + layers + (parts.virtual is not None) + (parts.head is not None)

    @property
    def ranks(self) -> tuple[int, int]:
        """(smallest, largest) rank over the places with a low-rank term; (0, 0) where there are none."""
        low_rank_kinds = LinearPart | EmbeddingPart | ExpertsPart | RouterPart | MixturePart | RoutedPart
        ranks = [part.rank for _, part in self.parts.placed() if isinstance(part, low_rank_kinds)]
        low_rank = [rank for rank in ranks if rank]
        return (min(low_rank), max(low_rank)) if low_rank else (0, 0)
