"""LoRAMoE (Dou et al., 2023, arXiv 2312.09979): several LoRAs at each feed-forward layer, weighed by a router there.

The balance loss is the paper's for data of one kind: var(Q) / mean(Q) of Q [E, rows], a row's mean share of each
expert. (With two kinds of data the paper also ties halves of the experts to them; there is one kind here.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peftmux.adapters.methods.lora import lora_scaling
from peftmux.adapters.torch_base import TorchBase
from peftmux.kernels.lowrank import LinearPart, apply_linear_part
from peftmux.trainer.host.host import Change
from peftmux.trainer.host.sites import ALL_LINEAR, select_sites, spelled_out
from peftmux.trainer.methods.base import AttachContext, AttachedAdapter, Method
from peftmux.trainer.methods.experts import Experts, ExpertsConfig, RoutedAdapter
from peftmux.trainer.methods.linear import expert_notes, uniform, weight_out_in
from peftmux.trainer.methods.lora import default_learning_rate


@dataclass(frozen=True, kw_only=True)
class LoraMoeConfig(ExpertsConfig):
    """LoRAMoE's options; the sizes are the paper's."""

    r: int = field(default=4, metadata={"help": "rank of each expert"})
    num_experts: int = field(default=6, metadata={"help": "experts at each layer"})
    target_modules: str | list[str] | None = field(
        default=None,
        metadata={"help": "names of linear layers, or one regular expression; default: those of feed-forward blocks"},
    )


class LoraMoeLinear(Change):
    """A router [E, in] over `Experts`. y: [..., out], x: [..., in]."""

    balance: Tensor | None = None

    def __init__(self, layer: nn.Module, config: LoraMoeConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.experts = Experts(layer, config, generator)
        width = weight_out_in(layer).shape[1]
        self.router = uniform((config.num_experts, width), width**-0.5, generator, self.experts.A.device)
        self.scale = lora_scaling(config.lora_alpha, config.r, False)
        self.adapter: tuple[RoutedAdapter, ...] = ()  # in a tuple: it is no submodule

    def part(self) -> LinearPart:
        a, b = self.experts.A.flatten(0, 1), self.experts.B.transpose(0, 1).flatten(1)
        return LinearPart(a, b, self.scale, gate=self.router)

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        if self.training:
            found = self.adapter[0].counted(x)
            self.balance = None if found is None else balance(self._shares(found[0]), found[1])
        return apply_linear_part(y, x, self.part())

    def _shares(self, x: Tensor) -> Tensor:
        return linear(x.to(self.router.dtype), self.router).softmax(-1)

    def file_tensors(self) -> Mapping[str, Tensor]:
        return {"moe_gate.weight": self.router, **self.experts.file_tensors()}


def balance(shares: Tensor, counted: Tensor) -> Tensor:
    """shares: [B, T, E], counted: [B, T] -> the variance of the rows' mean shares over their mean."""
    weights = counted.to(shares.dtype).unsqueeze(-1)
    importance = (shares * weights).sum(1) / weights.sum(1)
    return importance.var(correction=0) / importance.mean()


def _attach(model: Any, config: LoraMoeConfig, context: AttachContext) -> AttachedAdapter:
    sites = select_sites(model, config.target_modules or _feed_forward(model))
    generator = torch.Generator().manual_seed(context.seed)
    changes = {name: LoraMoeLinear(layer, config, generator) for name, layer in sites.items()}
    written = {
        "peft_type": "LORAMOE",
        "routing_strategy": "loramoe",
        **{name: getattr(config, name) for name in ("r", "lora_alpha", "num_experts")},
        "target_modules": spelled_out(model, list(sites)),
        "router_aux_loss_coef": config.balance_weight,
    }
    adapter = RoutedAdapter("loramoe", model, changes, written, notes=expert_notes(model))
    adapter.balance_weight = config.balance_weight
    for change in changes.values():
        change.adapter = (adapter,)
    return adapter


def _feed_forward(model: Any) -> str | list[str]:
    """The linear layers of feed-forward blocks; all, where none is found."""
    blocks = TorchBase(model).feed_forwards.values()
    return [f"{block.name}.{name}" for block in blocks for name in (*block.inner, block.outer)] or ALL_LINEAR


LORAMOE = Method(
    name="loramoe",
    summary="several LoRAs at each feed-forward layer, weighed by a router",
    config_class=LoraMoeConfig,
    attach=_attach,
    # An expert counts for one in six until the router has learned: at LoRA's rate their sum moves as much slower.
    learning_rate=lambda hidden_size: 3 * default_learning_rate(hidden_size),
)
