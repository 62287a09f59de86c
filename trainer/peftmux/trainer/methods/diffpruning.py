"""DiffPruning (Guo et al., 2021, arXiv 2012.07463): a difference to the weights that is trained to be sparse.

While it is being found the difference of an entry is z w, with z near 0 or 1 drawn from a relaxed ("hard concrete")
distribution that alpha shifts, and the expected number of entries that are not zero is part of the loss:

    z = min(1, max(0, s (r - l) + l)),   s = sigmoid(log u - log(1 - u) + alpha),   u ~ U(0, 1)
    E |z|_0 = sigmoid(alpha - log(-l / r))

and with `structured` z is the product of an entry's and of its matrix's. Then the largest entries are kept, over all
layers exactly as many as `sparsity` says, and trained on without z. Only they are exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peftmux.adapters.methods.ledger import PREFIX
from peftmux.trainer.errors import OptionError
from peftmux.trainer.host.host import Change
from peftmux.trainer.host.sites import ALL_LINEAR, select_sites, spelled_out
from peftmux.trainer.methods.base import AttachContext, AttachedAdapter, Method
from peftmux.trainer.methods.linear import expert_notes, weight_out_in

LOWER, UPPER = -1.5, 1.5
"""l and r of the paper; their ratio is 1, so that the logarithm above is 0."""


@dataclass(frozen=True, kw_only=True)
class DiffPruningConfig:
    """DiffPruning's options; what the paper gives is the default."""

    sparsity: float | None = field(
        default=None,
        metadata={
            "help": "share of the entries of the weights that may change; default: 2 * (in + out) of each weight's "
            "in * out, which is the paper's 0.5 % at BERT's width"
        },
    )
    structured: bool = field(default=True, metadata={"help": "let whole matrices be left out, too"})
    l0_weight: float = field(default=1.25e-7, metadata={"help": "weight of the expected count of entries in the loss"})
    alpha_init: float = field(default=5.0, metadata={"help": "where alpha starts: nearly every entry is on"})
    alpha_learning_rate: float = field(default=0.1, metadata={"help": "of alpha, which moves over several units"})
    final_share: float = field(default=0.5, metadata={"help": "of the steps, after the entries have been chosen"})
    target_modules: str | list[str] = field(
        default=ALL_LINEAR, metadata={"help": "names of linear layers, or one regular expression for whole paths"}
    )

    def __post_init__(self) -> None:
        if self.sparsity is not None and not 0 < self.sparsity <= 1:
            raise OptionError("sparsity", f"expected above 0 and at most 1, got {self.sparsity}")
        if not 0 <= self.final_share < 1:
            raise OptionError("final-share", f"expected 0 or more and below 1, got {self.final_share}")
        for name in ("l0_weight", "alpha_learning_rate"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise OptionError(name.replace("_", "-"), f"expected 0 or more, got {getattr(self, name)}")


class DiffLinear(Change):
    """w: [out, in] from zero; alpha: [out, in] and for the whole matrix [1]. `kept` is what is left once `chosen`."""

    kept: Tensor
    chosen: Tensor

    def __init__(self, layer: nn.Module, config: DiffPruningConfig, seed: int) -> None:
        super().__init__()
        weight = weight_out_in(layer)
        self.w = nn.Parameter(torch.zeros(weight.shape, device=weight.device))
        self.alpha = nn.Parameter(torch.full_like(self.w, config.alpha_init))
        self.alpha_matrix = nn.Parameter(self.w.new_full((1,), config.alpha_init)) if config.structured else None
        self.register_buffer("kept", torch.zeros_like(self.w, dtype=torch.bool))
        self.register_buffer("chosen", torch.zeros(1, dtype=torch.bool, device=weight.device))
        self.is_chosen = False
        """`chosen`, which is in checkpoints, without asking the device."""
        self.seed = seed
        """Of this layer's draws in this step: the same in every pass of it, in a resumed run, and among other jobs."""

    def delta(self) -> Tensor:
        """[out, in]: what is added to the weight."""
        if self.is_chosen:
            return self.w * self.kept
        draws = torch.Generator(self.w.device).manual_seed(self.seed) if self.training else None
        z = _gate(self.alpha, draws)
        return self.w * (z if self.alpha_matrix is None else z * _gate(self.alpha_matrix, draws))

    def expected_count(self) -> Tensor:
        count = self.alpha.sigmoid().sum()
        return count if self.alpha_matrix is None else count * self.alpha_matrix.sigmoid().squeeze()

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        delta = self.delta()
        return (y + linear(x.to(delta.dtype), delta)).to(y.dtype)

    @torch.no_grad()
    def choose(self, kept: Tensor) -> None:
        """From here on only these entries change, from what they are worth now."""
        training = self.training
        self.w.copy_(self.eval().delta() * kept)
        self.train(training)
        self.kept.copy_(kept)
        self.chosen.fill_(True)
        self.is_chosen = True


def _gate(alpha: Tensor, draws: torch.Generator | None) -> Tensor:
    """z; without draws its middle."""
    logits = alpha
    if draws is not None:
        u = torch.empty_like(alpha).uniform_(1e-6, 1 - 1e-6, generator=draws)
        logits = alpha + u.log() - (1 - u).log()
    return (logits.sigmoid() * (UPPER - LOWER) + LOWER).clamp(0, 1)


class DiffPruningAdapter(AttachedAdapter):
    """Chooses the entries when the first phase is over, at the latest when the training has ended."""

    has_phases = True
    has_files = False
    config: DiffPruningConfig
    seed: int

    @property
    def layers(self) -> dict[str, DiffLinear]:
        return {name: change for name, change in self.changes.items() if isinstance(change, DiffLinear)}

    @property
    def sparsity(self) -> float:
        """Over all layers."""
        if self.config.sparsity is not None:
            return self.config.sparsity
        entries = sum(layer.w.numel() for layer in self.layers.values())
        return min(1.0, sum(2 * sum(layer.w.shape) for layer in self.layers.values()) / entries)

    @property
    def chosen(self) -> bool:
        return all(layer.is_chosen for layer in self.layers.values())

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        super().restore(stored)
        for layer in self.layers.values():
            layer.is_chosen = bool(layer.chosen)

    def optimizer_groups(self, weight_decay: float, learning_rate: float) -> list[dict[str, Any]]:
        named = self.parameters
        alphas = [p for name, p in named.items() if ".alpha" in name]
        values = [p for name, p in named.items() if ".alpha" not in name]
        return [
            {"params": values, "weight_decay": weight_decay},
            {"params": alphas, "weight_decay": 0.0, "lr": self.config.alpha_learning_rate},
        ]

    def regulariser(self) -> Tensor | None:
        if self.chosen or not self.config.l0_weight:
            return None
        counts = torch.stack([layer.expected_count() for layer in self.layers.values()])
        return self.config.l0_weight * counts.sum()

    def before_step(self, step: int, total: int) -> None:
        for index, layer in enumerate(self.layers.values()):
            layer.seed = (self.seed * 1_000_003 + step) * 10_007 + index

    def after_step(self, step: int, total: int) -> None:
        if not self.chosen and step + 1 >= total - int(self.config.final_share * total):
            self.choose()

    def training_ended(self) -> None:
        """A checkpoint from before the choice may have come back as the best."""
        if not self.chosen:
            self.choose()

    @torch.no_grad()
    def choose(self) -> None:
        """Keep the largest entries of all layers: exactly so many as the sparsity says."""
        layers = list(self.layers.values())
        sizes = torch.cat([layer.eval().delta().abs().flatten() for layer in layers])
        kept = torch.zeros_like(sizes, dtype=torch.bool)
        kept[sizes.topk(max(1, round(self.sparsity * len(sizes)))).indices] = True
        for layer, mask in zip(layers, kept.split([layer.w.numel() for layer in layers]), strict=True):
            layer.train(self._model.training)
            layer.choose(mask.view_as(layer.w))

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """The kept entries of the layers that have some."""
        named = {}
        for place, layer in self._changed().items():
            named[f"{PREFIX}{place}.diff_values"] = layer.w[layer.kept].cpu()
            named[f"{PREFIX}{place}.diff_indices"] = layer.kept.nonzero().T.int().contiguous().cpu()
        return named

    def peft_config(self) -> dict[str, object]:
        places = spelled_out(self._model, list(self._changed()))
        return {**super().peft_config(), "target_modules": places, "sparsity": self.sparsity}

    def _changed(self) -> dict[str, DiffLinear]:
        assert self.chosen, "`training_ended` comes before any export"
        return {place: layer for place, layer in self.layers.items() if layer.kept.any()}


def _attach(model: Any, config: DiffPruningConfig, context: AttachContext) -> AttachedAdapter:
    sites = select_sites(model, config.target_modules)
    changes = {name: DiffLinear(layer, config, index) for index, (name, layer) in enumerate(sites.items())}
    adapter = DiffPruningAdapter("diffpruning", model, changes, {"peft_type": "DIFFPRUNING"}, notes=expert_notes(model))
    adapter.config, adapter.seed = config, context.seed
    return adapter


DIFFPRUNING = Method(
    name="diffpruning",
    summary="a sparse difference to the weights, found by training",
    config_class=DiffPruningConfig,
    attach=_attach,
    # 2.4e-4 at width 4096: falls as whole matrices' does (`layers`), from more, for few entries do what all do there.
    learning_rate=lambda hidden_size: min(1e-2, 1 / hidden_size),
)
