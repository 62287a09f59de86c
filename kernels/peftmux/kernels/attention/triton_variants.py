"""The launches of paged attention that are compiled ahead of time, on widths and options of models in use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from peftmux.kernels.attention.tiles import DECODE, SHORT, WHOLE
from peftmux.kernels.attention.triton_kernels import attend_tiles, store_kv
from peftmux.kernels.attention.triton_shapes import Shape, store_shape, store_warps
from peftmux.kernels.compile import Variant

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_PLAIN = {"WINDOW": False, "SOFTCAP": False, "SINKS": False}
_ALL = {"WINDOW": True, "SOFTCAP": True, "SINKS": True}

_KINDS = {"decode": DECODE, "short": SHORT, "whole": WHOLE}

# key/value heads, query heads of each, key width, value width, dtype, options, which launches
_LAYERS: dict[str, tuple[int, int, int, int, torch.dtype, Mapping[str, bool], tuple[str, ...]]] = {
    "llama": (8, 4, 128, 128, torch.bfloat16, _PLAIN, ("decode", "short", "whole", "store")),
    "options": (8, 4, 128, 128, torch.float16, _ALL, ("decode", "short", "whole", "store")),
    "qwen2": (2, 7, 64, 64, torch.bfloat16, _PLAIN, ("decode", "short", "whole", "store")),
    "gpt-oss": (8, 8, 64, 64, torch.bfloat16, _ALL, ("decode", "short", "whole")),
    "phi-3": (32, 1, 96, 96, torch.bfloat16, _PLAIN, ("decode", "short", "whole", "store")),
    "gemma": (4, 2, 256, 256, torch.bfloat16, _ALL, ("decode", "short", "whole")),
    "starcoder": (1, 48, 128, 128, torch.bfloat16, _PLAIN, ("decode", "store")),
    "deepseek": (16, 1, 192, 128, torch.bfloat16, _PLAIN, ("short", "whole")),
    "small": (4, 3, 32, 32, torch.float32, _ALL, ("decode", "whole")),
    "float32": (8, 4, 128, 128, torch.float32, _ALL, ("decode", "whole", "store")),
    "gemma float32": (4, 2, 256, 256, torch.float32, _ALL, ("decode", "short", "whole")),
    "widest": (2, 4, 512, 512, torch.bfloat16, _ALL, ("decode", "short", "whole")),
}


def variants() -> Iterator[Variant]:
    """Every kind of items and cache writes, over the layers above."""
    for name, (kv_heads, group, key_dim, value_dim, dtype, options, launches) in _LAYERS.items():
        for launch in launches:
            if launch == "store":
                yield _store(name, dtype, store_shape(kv_heads, key_dim, value_dim))
                continue
            shape = Shape(_KINDS[launch], kv_heads, group, key_dim, value_dim, 16, dtype)
            yield Variant(
                f"{launch}-{name}",
                attend_tiles,
                _signature(dtype),
                {**shape.constants, **options},
                num_warps=shape.num_warps,
                num_stages=shape.num_stages,
                max_registers=shape.max_registers,
                divisible=("q_token", "q_head"),
            )


def _store(name: str, dtype: torch.dtype, constants: dict[str, int]) -> Variant:
    strides = ("k_token", "k_head", "v_token", "v_head")
    signature = {
        **dict.fromkeys(("k", "v", "k_cache", "v_cache"), f"*{_TYPES[dtype]}"),
        **dict.fromkeys(strides, "i32"),
        "slots": "*i64",
    }
    return Variant(f"store-{name}", store_kv, signature, constants, num_warps=store_warps(constants), divisible=strides)


def _signature(dtype: torch.dtype) -> dict[str, Any]:
    element = f"*{_TYPES[dtype]}"
    return {
        **dict.fromkeys(("q", "k_cache", "v_cache", "out"), element),
        **dict.fromkeys(("sinks", "partials", "stats"), "*fp32"),
        **dict.fromkeys(("tiles", "counters"), "*i32"),
        **dict.fromkeys(("q_token", "q_head", "window", "first"), "i32"),
        **dict.fromkeys(("scale", "cap"), "fp32"),
    }
