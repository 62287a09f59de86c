"""Which form of paged attention a model runs: decided once, when it is loaded.

Libraries of attention kernels (FlashInfer, flash-attn) are no form: each lacks some of soft caps, sinks, value widths
and spans that see both ways, so a model would need two, and a row's bits would depend on what is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from peftmux.kernels import native
from peftmux.kernels.attention.cache import write_kv
from peftmux.kernels.attention.native_path import NativeAttention
from peftmux.kernels.attention.rows import AttentionRows
from peftmux.kernels.attention.torch_path import paged_attention_torch

_TRITON = (torch.float32, torch.bfloat16, torch.float16)


class Attend(Protocol):
    """`reference.paged_attention`'s signature."""

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        rows: AttentionRows,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class AttentionPath:
    """The chosen form and its name, for logs and tests."""

    name: str
    attend: Attend
    write_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    """`cache.write_kv`."""


def choose_attention(device: torch.device | str, dtype: torch.dtype) -> AttentionPath:
    """The fastest form here for a cache of this dtype on this device."""
    if native.Library.supports(device, dtype) and (library := native.load()):
        own = NativeAttention(library, dtype)
        return AttentionPath("native", own.attend, own.write_kv)
    if torch.device(device).type == "cuda" and dtype in _TRITON and importlib.util.find_spec("triton"):
        from peftmux.kernels.attention.triton_path import TritonAttention

        triton = TritonAttention(device, dtype)
        return AttentionPath("triton", triton.attend, triton.write_kv)
    return AttentionPath("torch", paged_attention_torch, write_kv)
