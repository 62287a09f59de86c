"""A random Llama of a given shape, made on the device, and the memory traffic that a step of it cannot avoid."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from peftmux.runtime.model.cache import block_bytes
from peftmux.runtime.model.loaded import LoadedModel

_COPIED_BYTES = 1 << 30
_COPIES = 10


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a Llama, and of what the benchmark asks of it."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    prompt: int
    """Tokens of a row before its first decode step."""
    prefill: int
    """Tokens of a step that only prefills."""
    ranks: tuple[int, ...]
    """Of the adapters, in turn."""
    prefix: int
    """Tokens of a prefix adapter."""
    copied: int = _COPIED_BYTES
    """Bytes copied to measure the bandwidth."""

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.context,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )


LLAMA_8B = Shape(
    hidden=4096,
    inner=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    vocabulary=128256,
    context=8192,
    prompt=256,
    prefill=2048,
    ranks=(16, 8, 32, 64),
    prefix=32,
)
TINY = Shape(
    hidden=64,
    inner=96,
    layers=2,
    heads=4,
    kv_heads=2,
    vocabulary=512,
    context=256,
    prompt=6,
    prefill=24,
    ranks=(4, 2),
    prefix=3,
    copied=1 << 16,
)


def random_llama(shape: Shape, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Initialised where it runs: no file, and no copy of 16 GB over the bus."""
    torch.manual_seed(0)
    with torch.device(device):
        module: PreTrainedModel = AutoModelForCausalLM.from_config(
            shape.config(), dtype=dtype, attn_implementation="eager"
        )
    return module


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second that a copy inside the device's memory reads and writes: the best of some."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(_COPIES):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size / best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, slots=True)
class Floor:
    """What a step has to read at least, and how fast the device reads."""

    weights: int
    """Bytes of the base that every step reads: all but the embedding table, of which it reads some rows."""
    kv_token: int
    """Bytes of one token's keys and values."""
    bytes_per_second: float

    @classmethod
    def of(cls, model: LoadedModel, bytes_per_second: float) -> Floor:
        table = model.vocab_size * model.hidden_size
        return cls(
            weights=(model.parameters - table) * model.dtype.itemsize,
            kv_token=block_bytes(model.kv_shapes, 1, model.dtype),
            bytes_per_second=bytes_per_second,
        )

    def decode_seconds(self, contexts: int, adapter_bytes: int) -> float:
        """contexts: tokens in the cache that the step's rows see, together; adapter_bytes: of its distinct adapters."""
        return (self.weights + contexts * self.kv_token + adapter_bytes) / self.bytes_per_second
