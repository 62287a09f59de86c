"""SHiRA (Bhardwaj et al., 2024, arXiv 2406.13175): few trained entries of each weight, added to the base's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peftmux.trainer.errors import OptionError
from peftmux.trainer.host.host import Change
from peftmux.trainer.host.sites import ALL_LINEAR, select_sites, spelled_out
from peftmux.trainer.methods.base import AttachContext, AttachedAdapter, Method
from peftmux.trainer.methods.linear import expert_notes, weight_out_in
from peftmux.trainer.methods.lora import default_learning_rate


@dataclass(frozen=True, kw_only=True)
class ShiraConfig:
    """SHiRA's options, in PEFT's names."""

    r: int = field(default=8, metadata={"help": "r * (in + out) entries of each weight: as many as a LoRA of rank r"})
    mask: Literal["random", "magnitude"] = field(
        default="random", metadata={"help": "which entries: random, or magnitude (the largest)"}
    )
    target_modules: str | list[str] = field(
        default=ALL_LINEAR, metadata={"help": "names of linear layers, or one regular expression for whole paths"}
    )

    def __post_init__(self) -> None:
        if self.r < 1:
            raise OptionError("r", f"expected 1 or more, got {self.r}")


class SparseLinear(Change):
    """values: [nnz] from zero, added at indices: [2, nnz] (row, column), sorted, of the weight [out, in]."""

    indices: Tensor

    def __init__(self, layer: nn.Module, config: ShiraConfig, generator: torch.Generator) -> None:
        super().__init__()
        weight = weight_out_in(layer)
        self._shape = tuple(weight.shape)
        count = config.r * sum(self._shape)
        if config.mask == "magnitude":
            flat = weight.detach().flatten().float().abs().topk(count).indices.sort().values.cpu()
        else:
            flat = torch.randperm(weight.numel(), generator=generator)[:count].sort().values
        rows, columns = flat // self._shape[1], flat % self._shape[1]
        self.register_buffer("indices", torch.stack([rows, columns]).to(weight.device))
        self.values = nn.Parameter(torch.zeros(count, device=weight.device))

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        delta = self.values.new_zeros(self._shape).index_put((self.indices[0], self.indices[1]), self.values)
        return (y + linear(x.to(delta.dtype), delta)).to(y.dtype)

    def file_tensors(self) -> Mapping[str, Tensor]:
        return {"shira_weight": self.values, "shira_indices": self.indices.int()}


def _attach(model: Any, config: ShiraConfig, context: AttachContext) -> AttachedAdapter:
    sites = select_sites(model, config.target_modules)
    if not all(isinstance(layer, nn.Linear) for layer in sites.values()):
        raise OptionError("method", "shira trains nn.Linear layers, as PEFT does; this base has others (Conv1D)")
    sites, notes = _large_enough(sites, config)
    generator = torch.Generator().manual_seed(context.seed)
    changes = {name: SparseLinear(layer, config, generator) for name, layer in sites.items()}
    written = {
        "peft_type": "SHIRA",
        "r": config.r,
        "mask_type": "random",
        "target_modules": spelled_out(model, list(sites)),
        "fan_in_fan_out": False,
        "init_weights": True,
    }
    return AttachedAdapter("shira", model, changes, written, notes=(*expert_notes(model), *notes))


def _large_enough(sites: dict[str, nn.Module], config: ShiraConfig) -> tuple[dict[str, nn.Module], tuple[str, ...]]:
    """The layers that have r * (in + out) entries, which PEFT asks for; of those that were asked for by name, all."""
    shapes = {name: tuple(weight_out_in(layer).shape) for name, layer in sites.items()}
    small = [name for name, (rows, columns) in shapes.items() if config.r * (rows + columns) > rows * columns]
    if not small:
        return sites, ()
    first = f"{small[0]} [{', '.join(map(str, shapes[small[0]]))}]"
    if config.target_modules != ALL_LINEAR or len(small) == len(sites):
        most = math.prod(shapes[small[0]]) // sum(shapes[small[0]])
        raise OptionError(
            "r", f"expected at most {most} for {first}, which has no r * (in + out) entries; got {config.r}"
        )
    left = {name: layer for name, layer in sites.items() if name not in small}
    return left, (f"{len(small)} layers, e.g. {first}, have fewer than r * (in + out) entries: not adapted",)


SHIRA = Method(
    name="shira",
    summary="few trained entries of each weight",
    config_class=ShiraConfig,
    attach=_attach,
    # An entry is one weight where a LoRA's moves a whole row and column: at twice LoRA's rate it learned half as much.
    learning_rate=lambda hidden_size: 4 * default_learning_rate(hidden_size),
)
