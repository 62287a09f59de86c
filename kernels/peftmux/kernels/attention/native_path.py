"""Paged attention in C++ (native/src/attention.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from peftmux.kernels.attention.cache import check_attention, check_store
from peftmux.kernels.attention.rows import AttentionRows
from peftmux.kernels.attention.torch_path import attend_rows
from peftmux.kernels.native import Library, levels

_ANY = 2**31 - 1
_LONG = 128
"""With matrix tiles (AMX), torch's own products are faster from about so many queries a row on."""


class NativeAttention:
    """Attention and cache writes for caches of one dtype in CPU memory."""

    def __init__(self, library: Library, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._most = _LONG if dtype is torch.bfloat16 and levels.has("amx_bf16") else _ANY
        self._attention = library.function("peftmux_attention", dtype)
        self._store_kv = library.function("peftmux_store_kv", dtype)

    def attend(
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
    ) -> Tensor:
        """As `reference.paged_attention`; q's tokens may stand apart, its heads not.

        In bfloat16 on a CPU with matrix tiles, rows of more than _LONG queries are torch's (plain and windowed ones).
        """
        tokens, heads, key_dim = q.shape
        _, block, kv_heads, value_dim = v_cache.shape
        check_attention(q, k_cache, v_cache, rows, self._dtype)
        if q.stride(2) != 1 or q.stride(1) != key_dim:
            q = q.contiguous()
        if sinks is not None:
            sinks = sinks.to(torch.float32).contiguous()
        most = self._most if softcap is None and sinks is None else _ANY
        out = torch.empty(tokens, heads, value_dim, dtype=self._dtype)
        table = rows.table
        self._attention(
            q.data_ptr(),
            q.stride(0),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            out.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            rows.table_address,
            table.stride(0),
            len(rows.query_lens),
            tokens,
            heads,
            kv_heads,
            key_dim,
            value_dim,
            block,
            scale,
            softcap or 0.0,
            window or 0,
            most,
            rows.threads,
        )
        if rows.longest > most:
            for row, queries in enumerate(rows.query_lens):
                if queries > most:
                    attend_rows(out, q, k_cache, v_cache, rows, row, row + 1, scale, window)
        return out

    def write_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
        """As `cache.write_kv`; slots must lie in the cache."""
        tokens, heads, key_dim = k.shape
        value_dim = v.shape[2]
        check_store(k, v, k_cache, v_cache, slots, self._dtype)
        if k.stride()[1:] != (key_dim, 1):
            k = k.contiguous()
        if v.stride()[1:] != (value_dim, 1):
            v = v.contiguous()
        self._store_kv(
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            slots.data_ptr(),
            tokens,
            heads * key_dim,
            heads * value_dim,
        )
