"""Linear layers whose weights are kept in 4 or 8 bits: which they are, and what weight they stand for.

bitsandbytes keeps NF4 and int8, torchao float8.

Source: QLoRA (Dettmers et al., 2023, arXiv 2305.14314), LLM.int8() (Dettmers et al., 2022, arXiv 2208.07339).
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peftmux.adapters.float8 import Float8Linear, adopt_float8

_FOUR, _EIGHT = "Linear4bit", "Linear8bitLt"
QUANTISATIONS = ("nf4", "int8", "fp8")


def is_quantised(layer: object) -> bool:
    if isinstance(layer, Float8Linear):
        return True
    return type(layer).__module__.startswith("bitsandbytes.") and type(layer).__name__ in (_FOUR, _EIGHT)


@torch.no_grad()
def dequantised(layer: Any) -> Tensor:
    """The weight that the layer computes with, [out, in] float32. A new tensor."""
    if isinstance(layer, Float8Linear):
        return layer.dequantised().float()
    if type(layer).__name__ == _EIGHT:
        weight, state = layer.weight, layer.state
        scales = weight.SCB if getattr(weight, "SCB", None) is not None else state.SCB
        codes: Tensor = state.CB if getattr(state, "CB", None) is not None else weight.data
        weight8: Tensor = codes.float() * scales.float().unsqueeze(1) / 127
        return weight8
    from bitsandbytes import functional  # type: ignore[import-untyped, unused-ignore]

    codes, state = layer.weight.data, layer.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):  # its first forward on a CPU packs the weight for its kernel
        codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, copy.copy(state))
    values: Tensor = functional.dequantize_4bit(codes, state)
    return values.reshape(layer.out_features, layer.in_features).float()


def by_weight_only(module: nn.Module) -> None:
    """Make int8 layers multiply unrounded inputs with their dequantised weight.

    bitsandbytes rounds a token's inputs to 8 bits too, but for columns in which any token of the batch is large: what a
    row computes would depend on the rows beside it.
    """
    for layer in module.modules():
        if is_quantised(layer) and type(layer).__name__ == _EIGHT:
            layer.forward = MethodType(_weight_only, layer)


def weights_stay_as_stored(module: nn.Module) -> None:
    """Make every use of a layer compute with the weight that is stored. To be called when a base is loaded.

    bitsandbytes packs 4-bit weights for its CPU kernel when a layer is first used in evaluation. Packing rounds the
    blocks' scales to bfloat16, and its kernel rounds its inputs: training would go on over another base than it began
    with, and serving give other numbers than training.
    """
    adopt_float8(module)
    for layer in module.modules():
        if is_quantised(layer) and type(layer).__name__ == _FOUR:
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _weight_only(layer: Any, x: Tensor) -> Tensor:
    return linear(x, dequantised(layer).to(x.dtype), layer.bias)


def quantisation_config(name: str, compute_dtype: torch.dtype) -> Any:
    """What transformers' from_pretrained takes to quantise a checkpoint while it is loaded.

    Raises ImportError, which names the extra to install.
    """
    require_library(name)
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if name == "fp8":
        from torchao.quantization import Float8WeightOnlyConfig

        return TorchAoConfig(Float8WeightOnlyConfig(set_inductor_config=False))
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)


def require_library(name: str) -> None:
    """Raises ImportError where the library that holds weights in this form, and accelerate, are not installed."""
    library, extra = ("torchao", "fp8") if name == "fp8" else ("bitsandbytes", "quant")
    if missing := [needed for needed in (library, "accelerate") if find_spec(needed) is None]:
        raise ImportError(f"{name} weights need {' and '.join(missing)}: pip install 'peftmux[{extra}]'")


def is_linear(layer: nn.Module) -> bool:
    """A plain linear layer, or a quantised one."""
    return type(layer) is nn.Linear or is_quantised(layer)
