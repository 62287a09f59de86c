"""Paged attention in Triton (triton_kernels.py) on tensors of one device."""

from __future__ import annotations

import torch
from torch import Tensor

from peftmux.kernels.attention.cache import check_attention, check_store
from peftmux.kernels.attention.rows import AttentionRows
from peftmux.kernels.attention.tiles import SHORT, WHOLE
from peftmux.kernels.attention.triton_ops import launch_attention, launch_store, paged_attention, write_kv
from peftmux.kernels.attention.triton_shapes import WIDEST, shapes_of

_WAVES = 32
"""Programs of a decode launch for each multiprocessor, at most."""


class TritonAttention:
    """Attention and cache writes for caches of one dtype. Its calls run one after the other, on one stream."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype) -> None:
        self._dtype = dtype
        device = torch.device(device)
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        self._most = _WAVES * processors
        # Launches count in the last one and leave zeros. A captured graph keeps reading the one it was captured with.
        with torch.inference_mode(False):
            self._counters = [torch.zeros(1 << 18, dtype=torch.int32, device=device)]

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
        """As `reference.paged_attention`; q's tokens and heads may stand apart.

        Sums are float32; the weights are rounded to the cache's dtype before they meet the values. Keys and values
        are of at most WIDEST elements.
        """
        check_attention(q, k_cache, v_cache, rows, self._dtype)
        if max(q.shape[2], v_cache.shape[3]) > WIDEST:
            raise ValueError(
                f"expected keys and values of at most {WIDEST} elements, got {q.shape[2]} and {v_cache.shape[3]}"
            )
        if q.stride(2) != 1:
            q = q.contiguous()
        if sinks is not None:
            sinks = sinks.to(torch.float32).contiguous()
        shapes = shapes_of(q, k_cache, v_cache)
        tiles = rows.tiles(q.shape[0], k_cache.shape[1], (shapes[SHORT].queries, shapes[WHOLE].queries))
        places = max(shape.programs * launch.partials for shape, launch in zip(shapes, tiles.launches, strict=True))
        attend = paged_attention if torch.compiler.is_compiling() else launch_attention
        out: Tensor = attend(
            q,
            k_cache,
            v_cache,
            sinks,
            tiles.table,
            self._enough(places),
            [n for launch in tiles.launches for n in (launch.items, launch.partials, launch.first)],
            self._most,
            scale,
            window or 0,
            softcap or 0.0,
        )
        return out

    def write_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
        """As `cache.write_kv`; a token whose slot is negative is not stored. Slots must lie in the cache."""
        check_store(k, v, k_cache, v_cache, slots, self._dtype)
        k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (k, v))
        store = write_kv if torch.compiler.is_compiling() else launch_store
        store(k, v, k_cache, v_cache, slots)

    def _enough(self, places: int) -> Tensor:
        """Zeros; grown ones are added, so that what a graph was captured with stays where it is."""
        latest = self._counters[-1]
        if places > latest.numel():
            with torch.inference_mode(False):
                latest = torch.zeros(2 * places, dtype=torch.int32, device=latest.device)
            self._counters.append(latest)
        return latest
