"""The paged key/value cache of every attention layer. Which block belongs to whom is the scheduler's knowledge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftmux.adapters.base import KVShape
from peftmux.adapters.parts import KVPrefix
from peftmux.kernels.attention import choose_attention, copy_blocks
from peftmux.runtime.model.attention import PagedLayer
from peftmux.runtime.model.loaded import LoadedModel
from peftmux.runtime.model.staging import on_device, to_device


def block_bytes(shapes: Sequence[KVShape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    per_token = sum(s.kv_heads * (s.key_dim + s.value_dim) for s in shapes)
    return per_token * block_size * dtype.itemsize


class PagedCache:
    """Allocates the cache; `attach` makes it the one that the model's attention modules use."""

    def __init__(self, model: LoadedModel, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._modules = [layer.module for layer in model.layers]
        self._layers: list[PagedLayer] = []
        path = choose_attention(model.device, model.dtype)
        for layer in model.layers:
            head = (num_blocks, block_size, layer.kv.kv_heads)
            k = torch.zeros(*head, layer.kv.key_dim, dtype=model.dtype, device=model.device)
            v = torch.zeros(*head, layer.kv.value_dim, dtype=model.dtype, device=model.device)
            self._layers.append(PagedLayer(k, v, model.step, path))

    def attach(self) -> None:
        """Replace the cache that the modules have used before."""
        for module, paged in zip(self._modules, self._layers, strict=True):
            module.paged = paged  # type: ignore[assignment]

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in every layer."""
        if copies:
            pairs = on_device(copies, self._layers[0].k_cache.device)
            for layer in self._layers:
                copy_blocks(layer.k_cache, layer.v_cache, pairs)

    def write_prefix(self, blocks: Sequence[int], prefix: KVPrefix) -> None:
        """Fill an adapter's own blocks with its keys and values, positions 0 .. n - 1."""
        (index,) = to_device([self.slots(blocks, 0, prefix.length)], self._layers[0].k_cache.device)
        for layer, k, v in zip(self._layers, prefix.keys, prefix.values, strict=True):
            layer.path.write_kv(_like(k, layer.k_cache), _like(v, layer.v_cache), layer.k_cache, layer.v_cache, index)

    def slot(self, blocks: Sequence[int], position: int) -> int:
        """Where this position of a row with these blocks lies in the flattened cache."""
        return blocks[position // self.block_size] * self.block_size + position % self.block_size

    def slots(self, blocks: Sequence[int], start: int, stop: int) -> list[int]:
        """Where positions start .. stop - 1 of a row with these blocks lie in the flattened cache."""
        size = self.block_size
        return [blocks[p // size] * size + p % size for p in range(start, stop)]


def _like(t: Tensor, cache: Tensor) -> Tensor:
    return t.to(cache.device, cache.dtype)
