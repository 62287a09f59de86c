"""IA3 (Liu et al., 2022, arXiv 2205.05638): trained vectors that scale activations; nothing else is added.

Feed-forward layers are scaled at their input (their bias is not), the others at their output, bias included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftmux.adapters.torch_base import TorchBase
from peftmux.kernels import inputs
from peftmux.kernels.lowrank import LinearPart, apply_linear_part
from peftmux.trainer.errors import OptionError
from peftmux.trainer.host.host import Change
from peftmux.trainer.host.sites import ALL_LINEAR, is_named, select_sites, spelled_out
from peftmux.trainer.methods.base import AttachContext, AttachedAdapter, Method
from peftmux.trainer.methods.linear import expert_notes, fan_in_fan_out, weight_out_in
from peftmux.trainer.methods.lora import default_learning_rate


@dataclass(frozen=True, kw_only=True)
class Ia3Config:
    """IA3's options, in PEFT's names."""

    target_modules: str | list[str] = field(
        default=ALL_LINEAR, metadata={"help": "names of linear layers, or one regular expression for whole paths"}
    )
    feedforward_modules: list[str] | None = field(
        default=None,
        metadata={"help": "those scaled at the input; default: whose input is not the hidden state (down projections)"},
    )
    exclude_modules: str | list[str] | None = field(default=None, metadata={"help": "layers left out again"})


class OutputScale(Change):
    """l: [out, 1], from one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        weight = weight_out_in(layer)
        self.ia3_l = nn.Parameter(torch.ones(weight.shape[0], 1, device=weight.device))

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        return apply_linear_part(y, x, LinearPart(out_scale=self.ia3_l.flatten()))

    def file_tensors(self) -> Mapping[str, Tensor]:
        return {"ia3_l": self.ia3_l}


class InputScale(Change):
    """l: [1, in], from one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        weight = weight_out_in(layer)
        self.ia3_l = nn.Parameter(torch.ones(1, weight.shape[1], device=weight.device))

    def before(self, x: Tensor) -> Tensor:
        return inputs.scale_input(x, inputs.InputScale(self.ia3_l.flatten()))

    def file_tensors(self) -> Mapping[str, Tensor]:
        return {"ia3_l": self.ia3_l}


def _attach(model: Any, config: Ia3Config, context: AttachContext) -> AttachedAdapter:
    sites = select_sites(model, config.target_modules, config.exclude_modules)
    feedforward = _feedforward(model, config, sites)
    changes: dict[str, Change] = {
        name: InputScale(layer) if name in feedforward else OutputScale(layer) for name, layer in sites.items()
    }
    written = {
        "peft_type": "IA3",
        "target_modules": spelled_out(model, list(sites)),
        "feedforward_modules": spelled_out(model, sorted(feedforward)) if feedforward else [],
        "exclude_modules": None,
        "fan_in_fan_out": fan_in_fan_out(sites.values()),
        "init_ia3_weights": True,
    }
    return AttachedAdapter("ia3", model, changes, written, notes=expert_notes(model))


def _feedforward(model: Any, config: Ia3Config, sites: Mapping[str, nn.Module]) -> set[str]:
    if config.feedforward_modules is None:
        base = TorchBase(model)
        wide = {name for name in sites if base.linear_sites[name].in_features != base.hidden_size}
        last = {name.rpartition(".")[2] for name in wide}
        return wide if not any(n.rpartition(".")[2] in last for n in sites.keys() - wide) else set()
    named = tuple(config.feedforward_modules)
    chosen = {site for site in sites if any(is_named(site, name) for name in named)}
    for name in named:
        if not any(is_named(site, name) for site in chosen):
            raise OptionError("feedforward-modules", f"expected names among the target modules, got {name!r}")
    return chosen


IA3 = Method(
    name="ia3",
    summary="trained vectors that scale activations",
    config_class=Ia3Config,
    attach=_attach,
    # 7e-3 at width 4096, near what PEFT's examples take; narrow bases learn faster with more.
    learning_rate=lambda hidden_size: 20 * default_learning_rate(hidden_size),
)
