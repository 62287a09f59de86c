"""What LoRAMoE and MixLoRA share: several low-rank pairs at a layer, and the tokens that their routers balance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftmux.trainer.data.encode import IGNORED
from peftmux.trainer.errors import OptionError
from peftmux.trainer.host.host import Host
from peftmux.trainer.methods.base import AttachedAdapter
from peftmux.trainer.methods.linear import uniform, weight_out_in

MAX_EXPERTS = 256


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Sizes, in the names of MoE-PEFT's files."""

    r: int = field(default=8, metadata={"help": "rank of each expert"})
    lora_alpha: float = field(default=16, metadata={"help": "an expert is scaled by lora_alpha / r"})
    num_experts: int = field(default=8, metadata={"help": "experts at each place"})
    balance_weight: float = field(default=0.01, metadata={"help": "weight of the loss that balances the experts"})

    def __post_init__(self) -> None:
        if self.r < 1:
            raise OptionError("r", f"expected 1 or more, got {self.r}")
        if not 2 <= self.num_experts <= MAX_EXPERTS:
            raise OptionError("num-experts", f"expected 2 to {MAX_EXPERTS}, got {self.num_experts}")
        if not 0 <= self.balance_weight < math.inf:
            raise OptionError("balance-weight", f"expected 0 or more, got {self.balance_weight}")
        if not math.isfinite(self.lora_alpha):
            raise OptionError("lora-alpha", f"expected a finite number, got {self.lora_alpha}")


class Experts(nn.Module):
    """E low-rank pairs of one linear layer. A: [E, r, in] as LoRA draws it, B: [E, out, r] zero."""

    def __init__(self, layer: nn.Module, config: ExpertsConfig, generator: torch.Generator) -> None:
        super().__init__()
        weight = weight_out_in(layer)
        out_features, in_features = weight.shape
        count, rank = config.num_experts, config.r
        self.A = uniform((count, rank, in_features), 1 / math.sqrt(in_features), generator, weight.device)
        self.B = nn.Parameter(torch.zeros(count, out_features, rank, device=weight.device))

    def file_tensors(self) -> dict[str, Tensor]:
        """By what follows the layer's path."""
        pairs = enumerate(zip(self.A, self.B, strict=True))
        return {f"experts.{e}.lora_{name}.weight": t for e, pair in pairs for name, t in zip("AB", pair, strict=True)}


class RoutedAdapter(AttachedAdapter):
    """Adds its routers' balance to the loss, over the tokens of each row up to the last that is learned.

    So padding, and with it the rows of other jobs beside its own, changes nothing.
    """

    balance_weight = 0.0
    _hook: RemovableHandle | None = None
    _labels: Tensor | None = None
    _last: Tensor | None = None

    def installed(self) -> None:
        self._hook = self._model.register_forward_pre_hook(self._find_ends, with_kwargs=True)

    def removed(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    def before_pass(self, labels: Tensor | None) -> None:
        self._labels = labels

    def _find_ends(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        labels, ids = kwargs.get("labels", self._labels), args[0] if args else kwargs.get("input_ids")
        rows = Host.of(self._model).rows_of(self.key)
        self._last = self._labels = None
        if labels is None or ids is None or rows is None:
            return
        places = torch.arange(ids.shape[1] - labels.shape[1], ids.shape[1], device=ids.device)
        self._last = torch.where(labels[rows] != IGNORED, places, 0).amax(1)

    def counted(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """What a layer reads [rows, T, D] and which tokens count [rows, T]; None where nothing is learned.

        x: [rows, T, D], or all tokens [rows * T, D], as some bases flatten them.
        """
        if self._last is None or (x.dim() == 3 and len(x) != len(self._last)):
            return None
        x = x.reshape(len(self._last), -1, x.shape[-1])
        return x, torch.arange(x.shape[1], device=x.device) <= self._last[:, None]

    def regulariser(self) -> Tensor | None:
        found: list[Any] = [getattr(change, "balance", None) for change in self.changes.values()]
        terms = [term for term in found if term is not None]
        if not terms or not self.balance_weight:
            return None
        return self.balance_weight * torch.stack(terms).mean()
