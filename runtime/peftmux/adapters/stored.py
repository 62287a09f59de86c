"""Checkpoints that are quantised already: which forms are taken as they are, which made plain, which refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftmux.adapters.quantised import is_quantised, require_library

_HELD = ("nf4", "fp4", "int8", "fp8")
_DEQUANTISED = {"fp8": "block-wise fp8", "mxfp4": "mxfp4"}
"""quant_method -> its name here: transformers makes plain weights of them while it loads them, on any device."""


def accept_stored(config: Any, asked: str | None) -> str | None:
    """The form in which the checkpoint of this transformers config holds its weights; None where they are plain.

    Where the form is one that is dequantised, `config` is told so. asked: one of QUANTISATIONS, or None.

    Raises ValueError where the form is unknown here or not the one asked for; ImportError where its library is missing.
    """
    holder = next((c for c in (config, config.get_text_config()) if getattr(c, "quantization_config", None)), None)
    if holder is None:
        return None
    stored = holder.quantization_config
    stored = dict(stored if isinstance(stored, Mapping) else stored.to_dict())
    form = _form(stored)
    if asked not in (None, form):
        raise ValueError(f"expected plain weights to make {asked} of, the checkpoint holds {form}")
    if form in _HELD:
        require_library(form)
    elif form in _DEQUANTISED.values():
        holder.quantization_config = {**stored, "dequantize": True}
    else:
        known = ", ".join((*_HELD, *_DEQUANTISED.values()))
        raise ValueError(f"expected plain weights or one of {known} (fp8: torchao's weight-only), got {form}")
    return form


@torch.no_grad()
def made_plain(model: Any) -> None:
    """Give weights that were dequantised to bfloat16 (older releases of transformers do) the dtype of the others."""
    dtype = model.get_input_embeddings().weight.dtype
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16 != dtype:
            parameter.data = parameter.data.to(dtype)


def _form(stored: Mapping[str, Any]) -> str:
    method = str(getattr(stored.get("quant_method"), "value", stored.get("quant_method")))
    if stored.get("load_in_8bit"):
        return "int8"
    if stored.get("load_in_4bit"):
        return str(stored.get("bnb_4bit_quant_type", "fp4"))
    if method == "torchao":
        kind = stored.get("quant_type")
        name = _torchao_config(kind.get("default")) if isinstance(kind, Mapping) else str(kind)
        return "fp8" if name == "Float8WeightOnlyConfig" else f"torchao's {name}"
    return _DEQUANTISED.get(method, method)


def _torchao_config(written: object) -> str:
    return str(written.get("_type")) if isinstance(written, Mapping) else str(written)


def strange_weights(module: nn.Module) -> list[str]:
    """Parameters that are neither plain numbers of 16 bits or more nor the weight of a layer known as quantised.

    Whatever reads a weight takes it for numbers: codes, or a tensor that only pretends to be one, must not get there.
    """
    found = []
    for path, layer in module.named_modules():
        if not is_quantised(layer):
            own = layer.named_parameters(path, recurse=False)
            found += [name for name, p in own if type(p.data) is not Tensor or p.dtype.itemsize < 2]
    return found
