"""Ladder side-tuning, the definition: a narrow transformer climbs beside the base, a block for each layer it reads.

With h[0] what the base's first layer reads, h[l + 1] what its layer l gives, and f its final hidden state:

    s      = first(h[0])
    s      = block_l(g s + (1 - g) down_l(h[l + 1])),   g = sigmoid(p_l / T)         for each layer l with a rung
    u      = up(norm(s))
    f'     = u,   f + u,   or m u + (1 - m) f with m = sigmoid(q / T)                as `merge` says

A block is a pre-norm decoder layer of the side's own width: s + o(attention(norm s)), then s + feed-forward(norm s),
with rotary positions, grouped keys and a gated feed-forward, as in Llama, whatever the base is.

Source: Sung et al., 2022, arXiv 2206.06522 (side network, down-projections, learned gates with a temperature; layer
dropping is a rung left out); the forms of `merge` as in its authors' code and text. The block is ours, for decoders;
its pieces: RMSNorm (arXiv 1910.07467), rotary embeddings (arXiv 2104.09864), SwiGLU (arXiv 2002.05202).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from peftmux.kernels.elementwise import rms_norm, rotated

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [..., T, H, E], k [..., T, Hkv, E], v [..., T, Hkv, E]) -> [..., T, H, E]: causal, scaled by 1 / sqrt(E)."""

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "silu": functional.silu,
}


@dataclass(frozen=True, slots=True)
class Affine:
    """weight: [out, in], bias: [out] or None."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class SideBlock:
    """Of width d, with H heads and Hkv key heads of E: q [H E, d], k and v [Hkv E, d], o [d, H E]; norms [d]."""

    attention_norm: Tensor
    q: Affine
    k: Affine
    v: Affine
    o: Affine
    feed_forward_norm: Tensor
    gate: Affine
    up: Affine
    down: Affine


@dataclass(frozen=True, slots=True)
class Rung:
    """layer: of the base, from 0. down: [d, D]; gate: [1], before the sigmoid."""

    layer: int
    down: Affine
    gate: Tensor
    block: SideBlock


@dataclass(frozen=True, slots=True)
class Ladder:
    """first: [d, D] of the stream's width D; norm: [d]; up: [F, d] of the final state's width F.

    rungs: by rising layer. merge_gate: [1], before the sigmoid, where `merge` is "gate".
    """

    first: Affine
    rungs: tuple[Rung, ...]
    norm: Tensor
    up: Affine
    heads: int
    kv_heads: int
    activation: str
    temperature: float
    rope_theta: float
    eps: float
    merge: Literal["add", "replace", "gate"] = "replace"
    merge_gate: Tensor | None = None

    @property
    def head_dim(self) -> int:
        return self.rungs[0].block.q.weight.shape[0] // self.heads

    @property
    def cached_values(self) -> int:
        """How many values of keys and values a token leaves in all rungs."""
        return 2 * len(self.rungs) * self.kv_heads * self.head_dim


def apply_ladder(
    stream: Sequence[Tensor], final: Tensor, ladder: Ladder, positions: Tensor, attend: Attend | None = None
) -> Tensor:
    """The definition above for whole sequences, differentiable; the base's tensors may be detached.

    stream: h[0] .. h[L], each [..., T, D]; final: [..., T, F]; positions: [T] or [..., T] -> [..., T, F] in final's
    dtype. attend: causal over T unless given, as padding or packing may ask for.
    """
    attention = attend or causal
    turn = rotation(positions, ladder)
    side = start(stream[0], ladder)
    for rung in ladder.rungs:
        side = climb(side, stream[rung.layer + 1], rung, ladder, turn, attention)
    return finish(side, final, ladder)


def rotation(positions: Tensor, ladder: Ladder) -> tuple[Tensor, Tensor]:
    """positions: [..., T] -> (cos, sin), each [..., T, 1, E] float32.

    The angle is p / theta^(2 i / E), for both halves of a head.
    """
    half = torch.arange(0, ladder.head_dim, 2, device=positions.device, dtype=torch.float32) / ladder.head_dim
    angles = positions.to(torch.float32).unsqueeze(-1) * ladder.rope_theta**-half
    angles = torch.cat([angles, angles], -1).unsqueeze(-2)
    return angles.cos(), angles.sin()


def start(h: Tensor, ladder: Ladder) -> Tensor:
    """h: [..., D], what the base's first layer reads -> [..., d] float32, as the side's stream stays in every dtype."""
    return _affine(h.to(ladder.norm.dtype), ladder.first).float()


def climb(side: Tensor, h: Tensor, rung: Rung, ladder: Ladder, turn: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
    """side: [..., T, d], h: [..., T, D], what the rung's layer gives; turn: `rotation` -> [..., T, d]."""
    gate = torch.sigmoid(rung.gate.float() / ladder.temperature)
    side = gate * side + (1 - gate) * _affine(h.to(ladder.norm.dtype), rung.down)
    block = rung.block
    x = _normed(side, block.attention_norm, ladder.eps)
    q, k, v = (_affine(x, part).unflatten(-1, (-1, ladder.head_dim)) for part in (block.q, block.k, block.v))
    mixed = attend(rotated(q, *turn), rotated(k, *turn), v)
    side = side + _affine(mixed.flatten(-2), block.o)
    x = _normed(side, block.feed_forward_norm, ladder.eps)
    return side + _affine(ACTIVATIONS[ladder.activation](_affine(x, block.gate)) * _affine(x, block.up), block.down)


def finish(side: Tensor, final: Tensor, ladder: Ladder) -> Tensor:
    """side: [..., d], final: [..., F] -> [..., F] in final's dtype: the final hidden state with the ladder."""
    up = _affine(_normed(side, ladder.norm, ladder.eps), ladder.up)
    if ladder.merge == "add":
        return (final + up).to(final.dtype)
    if ladder.merge_gate is None:
        return up.to(final.dtype)
    gate = torch.sigmoid(ladder.merge_gate.float() / ladder.temperature)
    return (gate * up + (1 - gate) * final).to(final.dtype)


def _affine(x: Tensor, part: Affine) -> Tensor:
    return functional.linear(x, part.weight, part.bias)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(x.float(), weight, eps).to(weight.dtype)


def causal(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """`Attend` over whole sequences. seen: [..., T, T] bool, query by key, instead of all that came before."""
    q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
    mask = None if seen is None else seen.unsqueeze(-3)
    grouped = q.shape[-3] != k.shape[-3]
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=seen is None, enable_gqa=grouped)
    return out.transpose(-3, -2)
