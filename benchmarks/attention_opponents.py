"""Others' attention over the same rows, where it is installed and can do it: each a function of a layer's tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from peftmux.kernels.attention import AttentionRows
from peftmux.kernels.attention.reference import read_cache


class Unable(Exception):
    """What is asked is not installed, or not what this library does; says which."""


@dataclass(frozen=True, eq=False)
class Layer:
    """q: [T, H, D], k_cache and v_cache: [NB, BS, Hkv, D]."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor


Attend = Callable[[Layer], Tensor]


def _plain(heads: Any, name: str) -> None:
    if heads.window or heads.softcap or heads.sinks:
        raise Unable(f"{name} is compared without window, soft cap and sinks")


def _installed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unable(f"{module} is not installed") from error


def flashinfer(rows: AttentionRows, heads: Any, layers: Sequence[Layer]) -> Attend:
    """Over the same paged cache."""
    _plain(heads, "flashinfer")
    library = _installed("flashinfer")
    layer = layers[0]
    device, dtype, size = layer.q.device, layer.q.dtype, layer.k_cache.shape[1]
    counts = [-(-n // size) for n in rows.context_lens]
    pages = [block for table, count in zip(rows.block_tables, counts, strict=True) for block in table[:count]]
    page_starts = _starts(counts, device)
    indices = torch.tensor(pages, dtype=torch.int32, device=device)
    last = torch.tensor([(n - 1) % size + 1 for n in rows.context_lens], dtype=torch.int32, device=device)
    space = torch.zeros(256 << 20, dtype=torch.uint8, device=device)
    shape = (heads.query, heads.key, heads.width, size)
    if rows.longest == 1:
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True)
        wrapper.plan(page_starts, indices, last, *shape, q_data_type=dtype, kv_data_type=dtype)
    else:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(space, "NHD")
        starts = _starts(rows.query_lens, device)
        wrapper.plan(starts, page_starts, indices, last, *shape, causal=True, q_data_type=dtype, kv_data_type=dtype)
    return lambda layer: wrapper.run(layer.q, (layer.k_cache, layer.v_cache))


def flash_attn(rows: AttentionRows, heads: Any, layers: Sequence[Layer]) -> Attend:
    """Over keys and values laid out without pages: each row's own, one after the other."""
    _plain(heads, "flash-attn")
    library = _installed("flash_attn")
    device = layers[0].q.device
    starts, keys = _starts(rows.query_lens, device), _starts(rows.context_lens, device)
    longest = max(rows.context_lens)
    laid = {id(layer): _laid_out(rows, layer) for layer in layers}
    return lambda layer: library.flash_attn_varlen_func(
        layer.q, *laid[id(layer)], starts, keys, rows.longest, longest, causal=True
    )


def torch_sdpa(rows: AttentionRows, heads: Any, layers: Sequence[Layer]) -> Attend:
    """Over keys and values laid out without pages: rows of one query with equal contexts, or one fresh prompt."""
    _plain(heads, "torch's attention")
    contexts = set(rows.context_lens)
    decode = rows.longest == 1
    if len(contexts) != 1 or not (decode or rows.query_lens == rows.context_lens):
        raise Unable("torch's attention is compared over rows of equal lengths")
    number = len(rows.query_lens)
    laid = {
        id(layer): [t.view(number, -1, *t.shape[1:]).transpose(1, 2) for t in _laid_out(rows, layer)]
        for layer in layers
    }

    def attend(layer: Layer) -> Tensor:
        q = layer.q.view(number, -1, *layer.q.shape[1:]).transpose(1, 2)
        k, v = laid[id(layer)]
        return scaled_dot_product_attention(q, k, v, is_causal=not decode, enable_gqa=True).transpose(1, 2)

    return attend


OPPONENTS = {"flashinfer": flashinfer, "flash_attn": flash_attn, "torch_sdpa": torch_sdpa}


def _starts(lens: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32, device=device)


def _laid_out(rows: AttentionRows, layer: Layer) -> tuple[Tensor, Tensor]:
    """Keys and values of all rows, [sum of contexts, Hkv, D]."""
    size = layer.k_cache.shape[1]
    slots = [
        table[j // size] * size + j % size
        for table, n in zip(rows.block_tables, rows.context_lens, strict=True)
        for j in range(n)
    ]
    index = torch.tensor(slots, device=layer.q.device)
    return read_cache(layer.k_cache, index), read_cache(layer.v_cache, index)
