"""The residual branches of a decoder: where the residual stream is read, and what is added to it.

Found by what a model computes on a few tokens, not by names: a branch's output plus the stream it read is what goes on.
Blocks that compute attention and feed-forward side by side, or norm a branch's output before it is added, have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftmux.adapters.base import ResidualBranch
from peftmux.adapters.probing import evaluating

_TOKENS = 5


@torch.no_grad()
def residual_branches(model: nn.Module) -> dict[str, ResidualBranch]:
    """By module path. `model` is as transformers loads it, in evaluation mode or not."""
    layers = decoder_layers(model)
    if not layers:
        return {}
    calls = _Calls({f"{path}.{name}": child for path, layer in layers for name, child in layer.named_children()})
    streams = _Calls(dict(layers))
    try:
        ids = torch.arange(_TOKENS, device=next(model.parameters()).device).unsqueeze(0)
        with evaluating(model):
            model(input_ids=ids, use_cache=False)
    finally:
        calls.remove()
        streams.remove()
    found: dict[str, ResidualBranch] = {}
    for index, (path, layer) in enumerate(layers):
        own = [f"{path}.{name}" for name, _ in layer.named_children()]
        found |= _branches(index, own, calls, streams.outputs.get(path))
    return found


def _branches(index: int, own: list[str], calls: _Calls, result: Tensor | None) -> dict[str, ResidualBranch]:
    """Of one layer. Whatever a norm reads is the residual stream at that point; the layer's result is its last."""
    norms = {name: calls.inputs[name] for name in own if calls.is_norm(name) and name in calls.inputs}
    found: dict[str, ResidualBranch] = {}
    for name in own:
        y = calls.outputs.get(name)
        if name in norms or y is None or result is None or y.shape != result.shape:
            continue
        if next(calls.modules[name].parameters(), None) is None:  # a dropout behind the branch itself
            continue
        for norm, h in norms.items():
            after = [other for other in (*norms.values(), result) if other is not h]
            if h.shape == y.shape and any(_adds(y, h, other) for other in after):
                role = "attention" if "Attention" in type(calls.modules[name]).__name__ else "feed_forward"
                found[name] = ResidualBranch(name, index, role, norm)
                break
    return found


def _adds(y: Tensor, h: Tensor, result: Tensor) -> bool:
    """Is the result h + y, and would half of one of them have been noticed?"""
    halves = (h + y / 2, h / 2 + y)
    return _same_sum(h + y, result) and not any(_same_sum(half, result) for half in halves)


def _same_sum(a: Tensor, b: Tensor) -> bool:
    """To the last place of each number: a sum is rounded once, and what is added may be small beside the rest."""
    last_place = torch.finfo(a.dtype).eps * b.float().abs()
    return a.shape == b.shape and bool(((a.float() - b.float()).abs() <= last_place).all())


class _Calls:
    """What modules are given and give during one forward: the first tensor of each, of those called once."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self._hooks = [
            module.register_forward_hook(self._note(name), with_kwargs=True) for name, module in modules.items()
        ]

    def is_norm(self, name: str) -> bool:
        return type(self.modules[name]).__name__.endswith("Norm")

    def _note(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            first = output[0] if isinstance(output, tuple) else output
            if given is not None and isinstance(first, Tensor):
                self.inputs[name], self.outputs[name] = given.detach().clone(), first.detach().clone()

        return hook

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def decoder_layers(model: Any) -> list[tuple[str, nn.Module]]:
    """(path, module) of the blocks: the first list of as many modules as the model has layers."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return [(f"{path}.{index}", layer) for index, layer in enumerate(module)]
    return []
