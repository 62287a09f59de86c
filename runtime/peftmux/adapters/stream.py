"""The residual stream between a decoder's layers, as a side network reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftmux.adapters.branches import decoder_layers
from peftmux.adapters.probing import evaluating

_TOKENS = 5


@torch.no_grad()
def stream_layers(model: nn.Module) -> tuple[str, ...]:
    """Paths of the decoder's layers, in order. None where some layer reads other than what the one before it gave.

    `model` is as transformers loads it, in evaluation mode or not.
    """
    layers = decoder_layers(model)
    given: list[Tensor | None] = []
    taken: list[Tensor | None] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        taken.append(stream_in(args, kwargs))
        given.append(stream_out(output))

    handles = [layer.register_forward_hook(note, with_kwargs=True) for _, layer in layers]
    try:
        device = next(model.parameters()).device
        with evaluating(model):
            model(input_ids=torch.arange(_TOKENS, device=device).unsqueeze(0), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    width = model.config.get_text_config(decoder=True).hidden_size  # type: ignore[operator, union-attr]
    shaped = all(t is not None and t.shape == (1, _TOKENS, width) for t in (*taken, *given))
    chained = all(a is b for a, b in zip(given, taken[1:], strict=False))
    return tuple(path for path, _ in layers) if shaped and chained and len(given) == len(layers) else ()


def decoders(module: Any) -> list[nn.Module]:
    """The modules of a causal model that may give it the final hidden states; some call an inner one (OPT)."""
    under = module.base_model
    found = (getattr(under, "decoder", None), under)
    return [one for one in found if isinstance(one, nn.Module) and one is not module]


def stream_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a layer reads of the arguments it is called with."""
    value = args[0] if args else kwargs.get("hidden_states")
    return value if isinstance(value, Tensor) else None


def stream_out(output: Any) -> Tensor | None:
    """What a layer gives of what it returns."""
    value = output[0] if isinstance(output, tuple) else output
    return value if isinstance(value, Tensor) else None
