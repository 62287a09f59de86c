"""MixLoRA (Li et al., 2024, arXiv 2404.15159): several low-rank variants of each feed-forward block, of which a router
chooses some for each token; plain LoRA at the attention's projections.

    balance loss = weight * E * sum_e F_e P_e,   F_e the share of tokens whose first choice is e, P_e e's mean share

Tokens are sorted by expert: `peftmux.kernels.mixture`'s definition is met for each, without a copy of the experts'
factors for every token, and the host waits for the device once a block, for how many each expert has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftmux.adapters.feed_forward import FeedForward, feed_forward
from peftmux.adapters.methods.lora import lora_scaling
from peftmux.adapters.torch_base import TorchBase
from peftmux.kernels.lowrank import LinearPart, apply_linear_part
from peftmux.kernels.mixture import all_shares, choose
from peftmux.trainer.errors import OptionError
from peftmux.trainer.host.host import Change
from peftmux.trainer.host.processes import processes, summed
from peftmux.trainer.host.sites import ALL_LINEAR, select_sites, spelled_out
from peftmux.trainer.methods.base import AttachContext, AttachedAdapter, Method
from peftmux.trainer.methods.experts import Experts, ExpertsConfig, RoutedAdapter
from peftmux.trainer.methods.lora import LoraLinear, default_learning_rate


@dataclass(frozen=True, kw_only=True)
class MixLoraConfig(ExpertsConfig):
    """MixLoRA's options."""

    top_k: int = field(default=2, metadata={"help": "experts that a token goes through"})
    target_modules: str | list[str] = field(
        default=ALL_LINEAR,
        metadata={"help": "names of linear layers, or one regular expression; feed-forward blocks' get experts"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top_k <= self.num_experts:
            raise OptionError("top-k", f"expected 1 to {self.num_experts}, the experts; got {self.top_k}")


class MixtureBlock(Change):
    """In the place of a feed-forward block. router: [E, D] from N(0, 0.02^2); experts by projection."""

    replaces = True
    load: tuple[Tensor, Tensor] | None = None
    """Of the last pass, for each expert [E]: the tokens whose first choice it is, and the sum of its shares."""

    def __init__(
        self,
        module: nn.Module,
        block: FeedForward,
        projections: list[str],
        config: MixLoraConfig,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self._block = block
        self._layers = {name: getattr(module, name) for name in (*block.inner, block.outer)}  # the base's
        self.experts = nn.ModuleDict({n: Experts(self._layers[n], config, generator) for n in projections})
        first = next(iter(self.experts.values()))
        assert isinstance(first, Experts)
        width = width_in(self._layers[block.inner[0]])
        drawn = torch.randn(config.num_experts, width, generator=generator) * 0.02
        self.router = nn.Parameter(drawn.to(first.A.device))
        self.top_k = config.top_k
        self.scale = lora_scaling(config.lora_alpha, config.r, False)
        self.adapter: tuple[RoutedAdapter, ...] = ()  # in a tuple: it is no submodule

    def after(self, y: Tensor | None, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        shares = all_shares(tokens, self.router)
        if self.training:
            found = self.adapter[0].counted(shares.view(*x.shape[:-1], -1))
            self.load = None if found is None else load(*found)
        return self.mixed(tokens, *choose(shares, self.top_k)).view_as(x)

    def mixed(self, x: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        """x: [N, D], shares of the chosen experts: [N, k] -> [N, D]."""
        block, outer = self._block, self._block.outer
        places, counts = by_expert(chosen, len(self.router))
        tokens, share = places // chosen.shape[1], shares.flatten()[places].unsqueeze(1)
        given = x.index_select(0, tokens)
        inner = {name: self._layers[name](x).index_select(0, tokens) for name in block.inner}
        own = [self._changed(y, given, name, counts) for name, y in inner.items()]
        h = block.activate(own)
        nothing = torch.zeros(len(x), h.shape[1], dtype=shares.dtype, device=x.device)
        out: Tensor = self._layers[outer](nothing.index_add(0, tokens, share * h).to(x.dtype))
        if outer not in self.experts:
            return out
        added = self._changed(torch.zeros(given.shape, dtype=shares.dtype, device=x.device), h, outer, counts)
        return out.to(shares.dtype).index_add(0, tokens, share * added).to(out.dtype)

    def _changed(self, y: Tensor, x: Tensor, name: str, counts: list[int]) -> Tensor:
        """y: [N k, out], x: [N k, in], so many of each expert, in their order."""
        if name not in self.experts:
            return y
        experts: Any = self.experts[name]
        pieces = zip(y.split(counts), x.split(counts), experts.A, experts.B, strict=True)
        return torch.cat([apply_linear_part(y, x, LinearPart(a, b, self.scale)) for y, x, a, b in pieces])

    def file_tensors(self) -> Mapping[str, Tensor]:
        named: dict[str, Tensor] = {"moe_gate.weight": self.router}
        for name, experts in self.experts.items():
            assert isinstance(experts, Experts)
            named |= {f"{name}.{key}": tensor for key, tensor in experts.file_tensors().items()}
        return named


class MixLoraAdapter(RoutedAdapter):
    """Its balance is that of the tokens of all processes."""

    def regulariser(self) -> Tensor | None:
        loads = [change.load for change in self.changes.values() if isinstance(change, MixtureBlock) and change.load]
        if not loads or not self.balance_weight:
            return None
        counts, shares = (torch.stack(columns) for columns in zip(*loads, strict=True))
        return self.balance_weight * balance(counts, shares).mean()


def by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """chosen: [N, k] -> the places in its flat form sorted by expert [N k], and how many each expert has.

    The counts are all that the host waits for.
    """
    found, places = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(found, torch.arange(experts, device=chosen.device), right=True)
    return places, ends.diff(prepend=ends.new_zeros(1)).tolist()


def load(shares: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """shares: [B, T, E], counted: [B, T] -> `MixtureBlock.load`; without a wait for the device."""
    told = counted.unsqueeze(-1)
    first = shares.argmax(-1, keepdim=True) == torch.arange(shares.shape[-1], device=shares.device)
    return (first & told).sum((0, 1)), torch.where(told, shares, 0).sum((0, 1))


def balance(counts: Tensor, shares: Tensor) -> Tensor:
    """counts, shares: [..., E] of one process -> [...]: E * sum_e F_e P_e, 1 where all experts have the same share.

    F is that of all processes; P is this one's part of it, times their number: their mean, as that of their gradients,
    is what one process has of all tokens.
    """
    counts = summed(counts)
    tokens = counts.sum(-1, keepdim=True)  # each has one first choice
    return counts.shape[-1] * (counts / tokens * (processes() * shares / tokens)).sum(-1)


def width_in(layer: nn.Module) -> int:
    """What a linear layer reads."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.shape[1 if isinstance(layer, nn.Linear) else 0]


def _attach(model: Any, config: MixLoraConfig, context: AttachContext) -> AttachedAdapter:
    sites = select_sites(model, config.target_modules)
    generator = torch.Generator().manual_seed(context.seed)
    changes: dict[str, Change] = {}
    blocks = []
    for path, site in TorchBase(model).feed_forwards.items():
        projections = [name for name in (*site.inner, site.outer) if f"{path}.{name}" in sites]
        module = model.get_submodule(path)
        found = feed_forward(module) if projections else None
        if found is not None:
            changes[path] = block = MixtureBlock(module, found, projections, config, generator)
            blocks.append(block)
    if not blocks:
        raise OptionError(
            "target-modules", f"expected projections of a feed-forward block of {type(model).__name__}, got none"
        )
    scale = lora_scaling(config.lora_alpha, config.r, False)
    for name, layer in sites.items():
        if name.rpartition(".")[0] not in changes:
            changes[name] = LoraLinear(layer, config.r, scale, 0.0, generator)
    written = {
        "peft_type": "MIXLORA",
        "routing_strategy": "mixlora",
        **{name: getattr(config, name) for name in ("r", "lora_alpha", "num_experts", "top_k")},
        "target_modules": spelled_out(model, list(sites)),
        "router_aux_loss_coef": config.balance_weight,
    }
    adapter = MixLoraAdapter("mixlora", model, changes, written)
    adapter.balance_weight = config.balance_weight
    for block in blocks:
        block.adapter = (adapter,)
    return adapter


MIXLORA = Method(
    name="mixlora",
    summary="low-rank variants of feed-forward blocks, chosen for each token",
    config_class=MixLoraConfig,
    attach=_attach,
    learning_rate=default_learning_rate,
)
