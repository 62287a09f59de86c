"""The randomness of a draw: a pure function of (seed, index of the generated token, vocabulary id).

There is no generator state, so nothing that happens to a row on its way (other rows, preemption, another device) can
change what it draws. The draw is the exponential race: with independent E_i ~ Exp(1), the argmin of E_i / p_i is i with
probability p_i (Gumbel-max in the log domain), for any unnormalised p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftmux.runtime.model.staging import on_device

_MASK = (1 << 64) - 1


def _signed(word: int) -> int:
    """The int32 of the same 32 bits."""
    return word - (1 << 32) if word >> 31 else word


_SPREAD = _signed(0x9E3779B1)
_MIX_1, _MIX_2 = _signed(0x85EBCA6B), _signed(0xC2B2AE35)


def _mix64(word: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood, 2014)."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def draw_key(seed: int, index: int) -> tuple[int, int]:
    """64 bits for one draw, as two int32."""
    word = _mix64((_mix64(seed & _MASK) + (index + 1) * 0x9E3779B97F4A7C15) & _MASK)
    return _signed(word >> 32), _signed(word & 0xFFFFFFFF)


def log_exponential(keys: Sequence[tuple[int, int]], ids: Tensor) -> Tensor:
    """log E for each row's key and vocabulary id. keys: R; ids: [R, K] or [1, K], int32 -> [R, K] float32.

    murmur3's 32-bit finaliser over the id, with one half of the key added before it and the other xored inside. In
    place throughout: this is the one pass over a whole vocabulary that an unrestricted draw cannot avoid.
    """
    halves = on_device(keys, ids.device, torch.int32)  # [R, 2]
    bits = ids * _SPREAD + halves[:, :1]
    scratch = torch.empty_like(bits)
    _xor_shift(bits, 16, scratch)
    bits.mul_(_MIX_1).bitwise_xor_(halves[:, 1:])
    _xor_shift(bits, 13, scratch)
    bits.mul_(_MIX_2)
    _xor_shift(bits, 16, scratch)
    # Uniform in (0, 1), finest near 0, where the winners of the race are: E = -log(1 - u).
    uniform = bits.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_()


def _xor_shift(bits: Tensor, shift: int, scratch: Tensor) -> None:
    """bits ^= bits >>> shift; int32 shifts arithmetically, so the copied signs are masked off."""
    torch.bitwise_right_shift(bits, shift, out=scratch)
    bits.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))
