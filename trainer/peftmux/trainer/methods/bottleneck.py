"""Bottleneck adapters beside the residual stream, in the folders and with the names of AdapterHub's library.

Houlsby et al., 2019, arXiv 1902.00751 (after attention and feed-forward); Pfeiffer et al., 2020, arXiv 2005.00247
(after the feed-forward alone); He et al., 2021, arXiv 2110.04366 (parallel to it, scaled). AdapterDrop (Rueckle et al.,
2021, arXiv 2010.11918): while training, the adapters of the first n layers are off, n drawn anew for each step, so that
some of them can be left out of the file. What a bottleneck computes is `peftmux.kernels.bottleneck`'s definition.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftmux.adapters.methods.bottleneck import PLACES
from peftmux.kernels.bottleneck import ACTIVATIONS, Bottleneck, LayerNorm, apply_bottleneck
from peftmux.kernels.bottleneck.reference import Reads
from peftmux.trainer.errors import OptionError
from peftmux.trainer.methods.base import AttachContext, AttachedAdapter, Method
from peftmux.trainer.methods.branches import BranchChange, Stream, branch_changes, chosen_branches
from peftmux.trainer.methods.linear import uniform
from peftmux.trainer.methods.lora import default_learning_rate

if TYPE_CHECKING:
    from peftmux.trainer.methods.task_head import TaskHead

NAME = "adapter"
"""Of the adapter, in its tensors' names."""


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig:
    """What all forms have, in AdapterHub's names."""

    reduction_factor: float = field(default=16, metadata={"help": "the base's width over the bottleneck's"})
    non_linearity: str = field(default="relu", metadata={"help": f"one of {', '.join(ACTIVATIONS)}"})
    scaling: float = field(default=1.0, metadata={"help": "of what the adapter adds"})
    ln_before: bool = field(default=False, metadata={"help": "norm what the adapter reads"})
    ln_after: bool = field(default=False, metadata={"help": "norm what it adds, from zero"})
    leave_out: list[int] = field(default_factory=list, metadata={"help": "layers without an adapter, from 0"})
    adapterdrop: int = field(
        default=0, metadata={"help": "in each training step the first 0 to so many layers are without their adapters"}
    )
    drop_first: int = field(default=0, metadata={"help": "leave the first layers' adapters out when serving"})

    def __post_init__(self) -> None:
        if not 0 < self.reduction_factor < math.inf:
            raise OptionError("reduction-factor", f"expected more than 0, got {self.reduction_factor}")
        if self.non_linearity.lower() not in ACTIVATIONS:
            raise OptionError("non-linearity", f"expected one of {', '.join(ACTIVATIONS)}; got {self.non_linearity!r}")
        if not self.scaling:
            raise OptionError("scaling", f"expected a number other than 0, got {self.scaling}")
        if not 0 <= self.drop_first <= self.adapterdrop:
            raise OptionError(
                "drop-first", f"expected 0 to {self.adapterdrop}, what --adapterdrop trains for; got {self.drop_first}"
            )


@dataclass(frozen=True, kw_only=True)
class HoulsbyConfig(BottleneckConfig):
    non_linearity: str = field(default="swish", metadata={"help": f"one of {', '.join(ACTIVATIONS)}"})


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(BottleneckConfig):
    reduction_factor: float = field(default=2, metadata={"help": "the base's width over the bottleneck's"})
    scaling: float = field(default=4.0, metadata={"help": "of what the adapter adds"})


@dataclass(frozen=True, slots=True)
class Form:
    """Where bottlenecks stand, and what they read. fields: of AdapterHub's config."""

    name: str
    roles: tuple[str, ...]
    reads: Reads

    @property
    def fields(self) -> dict[str, object]:
        return {
            "mh_adapter": "attention" in self.roles,
            "output_adapter": "feed_forward" in self.roles,
            "is_parallel": self.reads == "residual",
            "original_ln_before": self.reads == "sum",
            "original_ln_after": True,
            "residual_before_ln": True,
            "adapter_residual_before_ln": False,
        }


class BottleneckChange(BranchChange):
    """down: [m, D], up: [D, m] from zero, so that training starts from the base."""

    def __init__(
        self, stream: Stream, config: BottleneckConfig, reads: Reads, width: int, where: torch.device, draws: Any
    ) -> None:
        super().__init__(stream)
        self._reads, self._activation = reads, config.non_linearity.lower()
        size = max(1, int(width // config.reduction_factor))
        self.down = uniform((size, width), 1 / math.sqrt(width), draws, where)
        self.down_bias = nn.Parameter(torch.zeros(size, device=where))
        self.up = nn.Parameter(torch.zeros(width, size, device=where))
        self.up_bias = nn.Parameter(torch.zeros(width, device=where))
        self.scale = torch.tensor([config.scaling], device=where)
        self.norm_before = nn.LayerNorm(width, device=where) if config.ln_before else None
        self.norm_after = nn.LayerNorm(width, device=where) if config.ln_after else None
        if self.norm_after is not None:  # a norm of zero has a huge gradient and, with weight zero, none at all
            nn.init.zeros_(self.norm_after.weight)
            self.up = uniform((width, size), 1 / math.sqrt(size), draws, where)

    def part(self) -> Bottleneck:
        norms = _norm(self.norm_before), _norm(self.norm_after)
        return Bottleneck(
            self.down, self.down_bias, self.up, self.up_bias, self.scale, self._activation, self._reads, norms
        )

    def changed(self, y: Tensor, h: Tensor) -> Tensor:
        return apply_bottleneck(y, h, self.part())

    def hub_tensors(self) -> dict[str, Tensor]:
        down = "adapter_down.1" if self.norm_before else "adapter_down.0"
        named: dict[str, Tensor] = {f"{down}.weight": self.down, f"{down}.bias": self.down_bias}
        named |= {"adapter_up.weight": self.up, "adapter_up.bias": self.up_bias}
        for module, names in (
            (self.norm_before, ("adapter_norm_before", "adapter_down.0")),  # one module under two names
            (self.norm_after, ("adapter_norm_after",)),
        ):
            if module is not None:
                named |= {f"{name}.{key}": value for name in names for key, value in module.named_parameters()}
        return named


def _norm(layer: nn.LayerNorm | None) -> LayerNorm | None:
    return None if layer is None else LayerNorm(layer.weight, layer.bias)


class BottleneckAdapter(AttachedAdapter):
    """Bottlenecks of one form at the branches of some layers."""

    def __init__(self, model: Any, form: Form, config: BottleneckConfig, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.form, self.config, self._seed = form, config, seed
        self.branches = chosen_branches(model, form.roles, config.leave_out)
        last = max(branch.layer for branch in self.branches)
        if config.adapterdrop > last:
            raise OptionError(
                "adapterdrop",
                f"expected {last} at most, so that some adapter is always on; got {config.adapterdrop}",
            )
        width = model.config.get_text_config().hidden_size

        def build(stream: Stream) -> BottleneckChange:
            return BottleneckChange(stream, config, form.reads, width, model.device, generator)

        super().__init__(form.name, model, branch_changes(self.branches, build), {"peft_type": "ADAPTERHUB"})
        self._leave_out(config.drop_first)

    def before_step(self, step: int, total: int) -> None:
        if self.config.adapterdrop:
            self._leave_out(random.Random(self._seed * 1_000_003 + step).randint(0, self.config.adapterdrop))

    def after_step(self, step: int, total: int) -> None:
        self._leave_out(self.config.drop_first)

    def _leave_out(self, first: int) -> None:
        for branch in self.branches:
            change = self.changes[branch.name]
            assert isinstance(change, BottleneckChange)
            change.on = branch.layer >= first

    def tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for branch in self.branches:
            change = self.changes[branch.name]
            if isinstance(change, BottleneckChange) and branch.layer >= self.config.drop_first:
                stem = f"{branch.name.rpartition('.')[0]}.{PLACES[branch.role]}.adapters.{NAME}."
                named |= {stem + key: t.detach().float().cpu() for key, t in change.hub_tensors().items()}
        return named

    def folder(self, base_model: str, head: TaskHead | None = None) -> dict[str, bytes]:
        from peftmux.trainer.methods.hub_files import base_fields, hub_files

        config = self.config
        own = {
            **self.form.fields,
            "leave_out": sorted({*config.leave_out, *range(config.drop_first)}),
            **{name: getattr(config, name) for name in ("reduction_factor", "scaling", "ln_before", "ln_after")},
            "non_linearity": config.non_linearity.lower(),
            "init_weights": "mam_adapter",
            **dict.fromkeys(("cross_adapter", "phm_layer", "use_gating"), False),
            **dict.fromkeys(("inv_adapter", "inv_adapter_reduction_factor", "init_weights_seed")),
            **dict.fromkeys(("dropout", "stochastic_depth"), 0.0),
        }
        return hub_files({"config": own, "name": NAME}, self.tensors(), base_fields(self._model, base_model), head)


def _method(
    form: Form,
    summary: str,
    config_class: type[BottleneckConfig],
    learning_rate: Callable[[int], float] = lambda hidden_size: 2 * default_learning_rate(hidden_size),
) -> Method:
    def attach(model: Any, config: BottleneckConfig, context: AttachContext) -> AttachedAdapter:
        return BottleneckAdapter(model, form, config, context.seed)

    return Method(form.name, summary, config_class, attach, learning_rate)


HOULSBY = _method(
    Form("houlsby", ("attention", "feed_forward"), "branch"),
    "bottlenecks after attention and feed-forward",
    HoulsbyConfig,
)
PFEIFFER = _method(
    Form("pfeiffer", ("feed_forward",), "sum"),
    "bottlenecks after the feed-forward",
    BottleneckConfig,
    # 1.4e-3 at width 1024, where Houlsby et al. try 3e-5 to 3e-3; 3.4e-4 at 4096, where 3e-4 is usual (Hu et al., 2023,
    # arXiv 2304.01933).
    lambda hidden_size: min(1e-2, 1.4 / hidden_size),
)
PARALLEL = _method(
    Form("parallel", ("feed_forward",), "residual"), "bottlenecks beside the feed-forward", ParallelConfig
)
