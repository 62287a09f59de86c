"""AdaLoRA (Zhang et al., 2023, arXiv 2303.10512): W + s P Lambda Q with a rank budget that moves to where it matters.

PEFT's names: lora_A = Q [k, in], lora_E = Lambda [k, 1], lora_B = P [out, k], s = lora_alpha / (init_r + 1e-5). The
budget schedule runs by itself: all ranks through the warm-up, a cubic fall to the target, then constant. Only the
triplets that are left are exported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftmux.adapters.methods.adalora import triplets
from peftmux.adapters.methods.ledger import PREFIX
from peftmux.kernels.lowrank import LinearPart
from peftmux.trainer.errors import OptionError
from peftmux.trainer.host.sites import ALL_LINEAR, select_sites, spelled_out
from peftmux.trainer.methods.base import AttachContext, AttachedAdapter, Method
from peftmux.trainer.methods.linear import LinearChange, expert_notes, fan_in_fan_out, weight_out_in
from peftmux.trainer.methods.lora import default_learning_rate


@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig:
    """AdaLoRA's options, in PEFT's names; phases are shares of the run, so that they fit any number of steps."""

    init_r: int = field(default=12, metadata={"help": "rank at every layer in the beginning"})
    target_r: int = field(default=8, metadata={"help": "average rank over the layers in the end"})
    lora_alpha: float = field(default=32, metadata={"help": "the update is scaled by lora_alpha / init_r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the update's input, in training only"})
    warmup_share: float = field(default=0.1, metadata={"help": "of the steps before the budget falls (PEFT's tinit)"})
    final_share: float = field(default=0.3, metadata={"help": "of the steps after it has fallen (PEFT's tfinal)"})
    delta_t: int = field(default=1, metadata={"help": "steps between two allocations"})
    beta1: float = field(default=0.85, metadata={"help": "moving average of the sensitivity"})
    beta2: float = field(default=0.85, metadata={"help": "moving average of its uncertainty"})
    orth_reg_weight: float = field(default=0.1, metadata={"help": "weight of |P^T P - I| and |Q Q^T - I| in the loss"})
    target_modules: str | list[str] = field(
        default=ALL_LINEAR, metadata={"help": "names of linear layers, or one regular expression for whole paths"}
    )
    exclude_modules: str | list[str] | None = field(default=None, metadata={"help": "layers left out again"})

    def __post_init__(self) -> None:
        for name in ("init_r", "target_r", "delta_t"):
            if getattr(self, name) < 1:
                raise OptionError(name.replace("_", "-"), f"expected 1 or more, got {getattr(self, name)}")
        if not 0 < self.lora_alpha < math.inf:  # PEFT reads others as the pruned rank, which no training knows
            raise OptionError("lora-alpha", f"expected more than 0, got {self.lora_alpha}")
        if self.target_r > self.init_r:
            raise OptionError("target-r", f"expected at most init-r, {self.init_r}, got {self.target_r}")
        if min(self.warmup_share, self.final_share) < 0 or self.warmup_share + self.final_share >= 1:
            raise OptionError("final-share", "expected phases that leave steps in which the budget falls")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise OptionError(name, f"expected a number between 0 and 1, got {getattr(self, name)}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise OptionError("lora-dropout", f"expected 0 or more and below 1, got {self.lora_dropout}")

    def phases(self, total: int) -> tuple[int, int]:
        """(tinit, tfinal) in steps of a run of `total`."""
        return int(self.warmup_share * total), int(self.final_share * total)


def budget(config: AdaLoraConfig, sites: int, step: int, total: int) -> int:
    """Triplets that may be left after a step, over all sites. Equation 12 of the paper."""
    first, last = config.init_r * sites, config.target_r * sites
    start, end = config.phases(total)
    if step <= start:
        return first
    if step >= total - end:
        return last
    left = 1 - (step - start) / (total - end - start)
    return int(last + (first - last) * left**3)


class TripletLinear(LinearChange):
    """One layer's triplets, the ones the budget has taken away (`kept` is 0) with a singular value of zero."""

    low_rank_alone = True
    kept: Tensor

    def __init__(self, layer: nn.Module, config: AdaLoraConfig, generator: torch.Generator) -> None:
        super().__init__(config.lora_dropout)
        weight = weight_out_in(layer)
        (out_features, in_features), k = weight.shape, config.init_r
        self.lora_A = _normal((k, in_features), generator, weight.device)
        self.lora_E = nn.Parameter(torch.zeros(k, 1, device=weight.device))
        self.lora_B = _normal((out_features, k), generator, weight.device)
        self._alpha = config.lora_alpha
        self.register_buffer("kept", torch.ones(k, device=weight.device))
        for name in ("A", "E", "B"):
            like: Tensor = getattr(self, f"lora_{name}")
            self.register_buffer(f"sensitivity_{name}", torch.zeros_like(like))
            self.register_buffer(f"uncertainty_{name}", torch.zeros_like(like))

    def part(self) -> LinearPart:
        return triplets(self.lora_A, self.lora_E, self.lora_B, self._alpha, len(self.lora_E))

    def orthogonality(self) -> Tensor:
        """|Q Q^T - I| + |P^T P - I|, Frobenius norms."""
        eye = torch.eye(len(self.lora_E), device=self.lora_E.device)
        right, left = self.lora_A @ self.lora_A.T - eye, self.lora_B.T @ self.lora_B - eye
        norms: Tensor = torch.linalg.matrix_norm(torch.stack([right, left]))
        return norms.sum()

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """Moving averages of |w dL/dw| and of its distance from its average. Equations 9 and 10 of the paper."""
        for name in ("A", "E", "B"):
            weight, smooth, spread = (self.get_parameter(f"lora_{name}"), *self._averages(name))
            if weight.grad is None:
                continue
            seen = (weight * weight.grad).abs()
            smooth.lerp_(seen, 1 - beta1)
            spread.lerp_((seen - smooth).abs(), 1 - beta2)

    def _averages(self, name: str) -> tuple[Tensor, Tensor]:
        return self.get_buffer(f"sensitivity_{name}"), self.get_buffer(f"uncertainty_{name}")

    def importance(self) -> Tensor:
        """Of each triplet, [k]: its singular value's score and its vectors' mean scores. Equation 8 of the paper."""
        scores = {name: torch.mul(*self._averages(name)) for name in ("A", "E", "B")}
        return scores["E"].flatten() + scores["A"].mean(1) + scores["B"].mean(0)

    @torch.no_grad()
    def keep(self, mask: Tensor) -> None:
        self.kept.copy_(mask)
        self.lora_E.mul_(mask.unsqueeze(1))

    def file_tensors(self) -> Mapping[str, Tensor]:
        return {"lora_A": self.lora_A, "lora_B": self.lora_B, "lora_E": self.lora_E}


class AdaLoraAdapter(AttachedAdapter):
    """Follows the training: scores after each step, and an allocation where the schedule has one."""

    has_phases = True
    config: AdaLoraConfig
    total_steps = 1

    @property
    def triplets(self) -> dict[str, TripletLinear]:
        return {name: change for name, change in self.changes.items() if isinstance(change, TripletLinear)}

    def regulariser(self) -> Tensor | None:
        if not self.config.orth_reg_weight:
            return None
        terms = torch.stack([change.orthogonality() for change in self.triplets.values()])
        return self.config.orth_reg_weight * terms.sum() / (2 * len(terms))

    def after_step(self, step: int, total: int) -> None:
        self.total_steps = total
        layers = self.triplets.values()
        start, end = self.config.phases(total)
        final = min(total - end, total - 1)
        if step <= final:
            for layer in layers:
                layer.observe(self.config.beta1, self.config.beta2)
        if step == final:
            self._allocate(self.config.target_r * len(layers))
        elif start < step < final and step % self.config.delta_t == 0:
            self._allocate(budget(self.config, len(layers), step, total))
        else:  # the optimiser's momentum has moved what had been taken away
            for layer in layers:
                layer.keep(layer.kept)

    def training_ended(self) -> None:
        """A checkpoint from before the end of the schedule may have come back as the best."""
        target = self.config.target_r * len(self.triplets)
        if sum(int(layer.kept.sum()) for layer in self.triplets.values()) > target:
            self._allocate(target)

    def _allocate(self, count: int) -> None:
        """Keep the `count` most important triplets of all layers: exactly so many, whatever ties there are."""
        layers = list(self.triplets.values())
        chosen = torch.zeros(sum(len(layer.kept) for layer in layers), device=layers[0].kept.device)
        chosen[torch.cat([layer.importance() for layer in layers]).topk(count).indices] = 1
        for layer, mask in zip(layers, chosen.split([len(layer.kept) for layer in layers]), strict=True):
            layer.keep(mask)

    def tensors(self) -> dict[str, Tensor]:
        """Without the triplets that were taken away."""
        named = super().tensors()
        for place, layer in self.triplets.items():
            kept = layer.kept.bool().cpu()
            for name, dim in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
                full = f"{PREFIX}{place}.{name}"
                named[full] = named[full].index_select(dim, kept.nonzero().flatten()).contiguous()
        return named

    def peft_config(self) -> dict[str, object]:
        start, end = self.config.phases(self.total_steps)
        pattern = {f"{place}.lora_E": layer.kept.bool().tolist() for place, layer in self.triplets.items()}
        return {
            **super().peft_config(),
            "rank_pattern": pattern,
            "total_step": max(self.total_steps, start + end + 1),
            "tinit": start,
            "tfinal": end,
        }


def _normal(shape: tuple[int, int], generator: torch.Generator, device: torch.device) -> nn.Parameter:
    """From N(0, 0.02^2) on the CPU, so that every device starts from the same values."""
    return nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(device))


def _attach(model: Any, config: AdaLoraConfig, context: AttachContext) -> AttachedAdapter:
    sites = select_sites(model, config.target_modules, config.exclude_modules)
    generator = torch.Generator().manual_seed(context.seed)
    changes = {name: TripletLinear(layer, config, generator) for name, layer in sites.items()}
    written = {
        "peft_type": "ADALORA",
        "r": 8,  # PEFT's default; init_r is what counts
        "init_r": config.init_r,
        "target_r": config.target_r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "deltaT": config.delta_t,
        "beta1": config.beta1,
        "beta2": config.beta2,
        "orth_reg_weight": config.orth_reg_weight,
        "target_modules": spelled_out(model, list(sites)),
        "fan_in_fan_out": fan_in_fan_out(sites.values()),
    }
    adapter = AdaLoraAdapter("adalora", model, changes, written, notes=expert_notes(model))
    adapter.config = config
    return adapter


ADALORA = Method(
    name="adalora",
    summary="low-rank updates whose ranks move to where they matter",
    config_class=AdaLoraConfig,
    attach=_attach,
    learning_rate=lambda hidden_size: 2 * default_learning_rate(hidden_size),
)
