"""LoRA (Hu et al., 2021, arXiv 2106.09685): y + scale * B A x at linear layers, B starting at zero."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftmux.adapters.methods.lora import lora_scaling
from peftmux.adapters.patterns import PatternMatcher
from peftmux.kernels.lowrank import LinearPart
from peftmux.trainer.errors import OptionError
from peftmux.trainer.host.sites import ALL_LINEAR, select_sites, spelled_out
from peftmux.trainer.methods.base import AttachContext, AttachedAdapter, Method
from peftmux.trainer.methods.linear import LinearChange, expert_notes, fan_in_fan_out, uniform, weight_out_in

_TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA's options, in PEFT's names."""

    r: int = field(default=8, metadata={"help": "rank; 4 to 64, larger for more data or a domain far from the base's"})
    lora_alpha: float = field(default=16, metadata={"help": "the update is scaled by lora_alpha / r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the update's input, in training only"})
    target_modules: str | list[str] = field(
        default=ALL_LINEAR, metadata={"help": "names of linear layers, or one regular expression for whole paths"}
    )
    exclude_modules: str | list[str] | None = field(default=None, metadata={"help": "layers left out again"})
    layers_to_transform: list[int] | None = field(default=None, metadata={"help": "only these layers, from 0"})
    layers_pattern: list[str] | None = field(default=None, metadata={"help": "what the numbered layers' list is named"})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "JSON: rank by layer name"})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "JSON: lora_alpha by layer name"})
    use_rslora: bool = field(default=False, metadata={"help": "scale by lora_alpha / sqrt(r)"})

    def __post_init__(self) -> None:
        for pattern, rank in {"r": self.r, **self.rank_pattern}.items():
            if rank < 1:
                raise OptionError(
                    "r" if pattern == "r" else f"rank-pattern {pattern}", f"expected 1 or more, got {rank}"
                )
        for pattern, alpha in {"": self.lora_alpha, **self.alpha_pattern}.items():
            if not alpha > 0:
                raise OptionError(
                    f"alpha-pattern {pattern}" if pattern else "lora-alpha", f"expected more than 0, got {alpha}"
                )
        if not 0.0 <= self.lora_dropout < 1.0:
            raise OptionError("lora-dropout", f"expected 0 or more and below 1, got {self.lora_dropout}")


class LoraLinear(LinearChange):
    """A: [r, in] from U(-1/sqrt(in), 1/sqrt(in)) as PEFT draws it, B: [out, r] zero."""

    low_rank_alone = True
    rank_bounded: ClassVar[bool] = False
    """The rank is at most the weight's smaller side."""

    def __init__(self, base_layer: nn.Module, rank: int, scale: float, drop: float, generator: torch.Generator) -> None:
        super().__init__(drop)
        weight = weight_out_in(base_layer)
        out_features, in_features = weight.shape
        self.lora_A = uniform((rank, in_features), 1 / math.sqrt(in_features), generator, weight.device)
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=weight.device))
        self.scale = scale

    def part(self) -> LinearPart:
        return LinearPart(self.lora_A, self.lora_B, self.scale)

    def file_tensors(self) -> Mapping[str, Tensor]:
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}


def attach_lora(
    kind: str,
    model: Any,
    config: LoraConfig,
    context: AttachContext,
    linear: type[LoraLinear] = LoraLinear,
    use_dora: bool = False,
    adapter: type[AttachedAdapter] = AttachedAdapter,
) -> AttachedAdapter:
    """`linear` decides what stands at each site. Raises OptionError where the options match no layer of the model."""
    sites = select_sites(model, **{name: getattr(config, name) for name in _TARGETING})
    generator = torch.Generator().manual_seed(context.seed)
    matcher = PatternMatcher()

    def build(name: str, module: nn.Module) -> LinearChange:
        rank = config.rank_pattern.get(matcher.first_key("rank_pattern", config.rank_pattern, name) or "", config.r)
        if linear.rank_bounded:
            _check_rank(name, weight_out_in(module), rank)
        alpha_key = matcher.first_key("alpha_pattern", config.alpha_pattern, name)
        alpha = config.alpha_pattern.get(alpha_key or "", config.lora_alpha)
        scale = lora_scaling(alpha, rank, config.use_rslora)
        return linear(module, rank, scale, config.lora_dropout, generator)

    fields = {
        "peft_type": "LORA",
        "r": config.r,
        "lora_alpha": _as_int(config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "target_modules": spelled_out(model, list(sites)),
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": {k: _as_int(v) for k, v in config.alpha_pattern.items()},
        "use_rslora": config.use_rslora,
        "use_dora": use_dora,
        "fan_in_fan_out": fan_in_fan_out(sites.values()),
    }
    changes = {name: build(name, module) for name, module in sites.items()}
    return adapter(kind, model, changes, fields, notes=expert_notes(model))


def _check_rank(name: str, weight: Tensor, rank: int) -> None:
    most = min(weight.shape)
    if rank > most:
        shape = list(weight.shape)
        raise OptionError(
            "r", f"expected at most {most} for {name} {shape}, got {rank}: give --rank-pattern or --exclude-modules"
        )


def default_learning_rate(hidden_size: int) -> float:
    """5e-4 at width 2000, falling with the square root of the width.

    About ten times what full fine-tuning takes (the usual advice for LoRA), and nearly independent of the rank.
    """
    return float(f"{5e-4 * math.sqrt(2000 / hidden_size):.1e}")


def _as_int(value: float) -> float:
    return int(value) if value == int(value) else value


LORA = Method(
    name="lora",
    summary="low-rank updates of linear layers",
    config_class=LoraConfig,
    attach=lambda model, config, context: attach_lora("lora", model, config, context),
    learning_rate=default_learning_rate,
)
