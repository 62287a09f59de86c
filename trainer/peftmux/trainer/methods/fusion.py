"""AdapterFusion (Pfeiffer et al., 2020, arXiv 2005.00247): attention over several trained bottlenecks, which stay as
they are.

The first stage trains the bottlenecks, each by itself; this is the second. The file is one folder: the fusion's files
and a sub-folder for each adapter, named after the folder it came from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftmux.adapters.errors import AdapterError
from peftmux.adapters.files import AdapterFiles, read_adapter
from peftmux.adapters.hub import PEFT_TYPE
from peftmux.adapters.lower import plan_adapter
from peftmux.adapters.methods.bottleneck import PLACES, plan_bottlenecks
from peftmux.adapters.methods.ledger import Ledger
from peftmux.adapters.torch_base import TorchBase
from peftmux.kernels.bottleneck import Bottleneck, Fusion, apply_fusion
from peftmux.kernels.tree import mapped
from peftmux.trainer.errors import OptionError
from peftmux.trainer.methods.base import AttachContext, AttachedAdapter, Method
from peftmux.trainer.methods.branches import BranchChange, Stream, branch_changes

if TYPE_CHECKING:
    from peftmux.trainer.methods.task_head import TaskHead

_UNFIT = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """What is fused, and how strongly the values are held near the identity."""

    adapters: list[str] = field(
        metadata={"help": "folders of two or more bottleneck adapters of one form, none parallel"}
    )
    regularization: float = field(default=0.01, metadata={"help": "weight of |I - V|^2 in the loss, as the paper's"})

    def __post_init__(self) -> None:
        if len(self.adapters) < 2:
            raise OptionError("adapters", f"expected two or more folders, got {len(self.adapters)}")
        if not 0 <= self.regularization < float("inf"):
            raise OptionError("regularization", f"expected 0 or more, got {self.regularization}")


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter that is fused: its content, and its bottlenecks by branch."""

    name: str
    old_name: str
    files: AdapterFiles
    bottlenecks: dict[str, Bottleneck]

    def tensors(self) -> dict[str, Tensor]:
        """As its own file names them, under its new name."""
        prefix, old, new = f"adapter/{self.old_name}/", f".adapters.{self.old_name}.", f".adapters.{self.name}."
        found = {n.removeprefix(prefix): t for n, t in self.files.tensors.items() if n.startswith(prefix)}
        return {name.replace(old, new): tensor for name, tensor in found.items()}

    def config(self) -> dict[str, Any]:
        return {**self.files.config["adapters"][self.old_name], "name": self.name}


class FusionChange(BranchChange):
    """query, key: [D, D] near zero, value: [D, D] near the identity; the bottlenecks are constants.

    The key's bias adds the same to every score, which the softmax takes out again: its gradient is rounding alone,
    which Adam would scale up, and it stays zero.
    """

    def __init__(self, stream: Stream, bottlenecks: tuple[Bottleneck, ...], draws: torch.Generator) -> None:
        super().__init__(stream)
        self._bottlenecks = bottlenecks
        width, where = bottlenecks[0].up.shape[0], bottlenecks[0].up.device
        for name in ("query", "key"):
            self.register_parameter(name, nn.Parameter((torch.randn(width, width, generator=draws) * 0.02).to(where)))
            bias = nn.Parameter(torch.zeros(width, device=where), requires_grad=name == "query")
            self.register_parameter(f"{name}_bias", bias)
        self.value = nn.Parameter(torch.full((width, width), 1e-6, device=where).fill_diagonal_(1.0))

    def part(self) -> Fusion:
        named = {name: self.get_parameter(name) for name in ("query", "query_bias", "key", "key_bias", "value")}
        return Fusion(self._bottlenecks, **named)

    def changed(self, y: Tensor, h: Tensor) -> Tensor:
        return apply_fusion(y.flatten(0, -2), h.flatten(0, -2), self.part()).view_as(y)

    def distance(self) -> Tensor:
        """|I - V|^2."""
        return (torch.eye(len(self.value), device=self.value.device) - self.value).square().sum()

    def hub_tensors(self) -> dict[str, Tensor]:
        named = {f"{name}.weight": self.get_parameter(name) for name in ("query", "key", "value")}
        return {**named, **{f"{name}.bias": self.get_parameter(f"{name}_bias") for name in ("query", "key")}}


class FusionAdapter(AttachedAdapter):
    """Attention over the members at each of their branches."""

    def __init__(self, model: Any, members: list[Member], config: FusionConfig, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.members, self._weight = members, config.regularization
        self.branches = [b for b in TorchBase(model).branches.values() if b.name in members[0].bottlenecks]
        parts = iter([tuple(_placed(m.bottlenecks[b.name], model.device) for m in members) for b in self.branches])

        def build(stream: Stream) -> FusionChange:
            return FusionChange(stream, next(parts), generator)

        super().__init__("fusion", model, branch_changes(self.branches, build), {"peft_type": PEFT_TYPE})

    def regulariser(self) -> Tensor | None:
        if not self._weight:
            return None
        fused = [change for change in self.changes.values() if isinstance(change, FusionChange)]
        return self._weight * torch.stack([change.distance() for change in fused]).sum()

    def tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        names = ",".join(member.name for member in self.members)
        for branch in self.branches:
            change = self.changes[branch.name]
            assert isinstance(change, FusionChange)
            stem = f"{branch.name.rpartition('.')[0]}.{PLACES[branch.role]}.adapter_fusion_layer.{names}."
            named |= {stem + key: tensor.detach().cpu() for key, tensor in change.hub_tensors().items()}
        return named

    def folder(self, base_model: str, head: TaskHead | None = None) -> dict[str, bytes]:
        """A head of this run stands beside the fusion's files; those that the adapters had are left out."""
        from peftmux.trainer.methods.hub_files import base_fields, fusion_files, hub_files

        base = base_fields(self._model, base_model)
        files = fusion_files([member.name for member in self.members], self.tensors(), base, head)
        for member in self.members:
            own = hub_files(member.config(), member.tensors(), base, None)
            files |= {f"{member.name}/{name}": data for name, data in own.items()}
        return files


def _attach(model: Any, config: FusionConfig, context: AttachContext) -> AttachedAdapter:
    names = [_UNFIT.sub("_", Path(folder).resolve().name) or "_" for folder in config.adapters]
    if twice := [name for name in names if names.count(name) > 1]:
        raise OptionError("adapters", f"expected folders with different last names, got {twice[0]!r} twice")
    base = TorchBase(model)
    members = [_member(folder, name, base) for folder, name in zip(config.adapters, names, strict=True)]
    first = members[0].bottlenecks
    for member in members[1:]:
        if member.bottlenecks.keys() != first.keys():
            raise OptionError("adapters", f"expected adapters in the same layers, {member.name} is in others")
    reads = {part.reads for member in members for part in member.bottlenecks.values()}
    if len(reads) > 1:
        raise OptionError(
            "adapters", f"expected adapters of one form, got such that read {' and '.join(sorted(reads))}"
        )
    return FusionAdapter(model, members, config, context.seed)


def _member(folder: str, name: str, base: TorchBase) -> Member:
    """Raises OptionError for a folder that holds no single bottleneck adapter for this base."""
    try:
        files = read_adapter(folder)
        if files.config.get("peft_type") != PEFT_TYPE or files.config.get("fusion") is not None:
            raise OptionError("adapters", f"{folder}: expected a bottleneck adapter in AdapterHub's files")
        ((old, outer),) = files.config["adapters"].items()
        shapes = {tensor: tuple(t.shape) for tensor, t in files.tensors.items()}
        plan_adapter(files.config, shapes, base)  # what serving refuses is refused here too
        own = plan_bottlenecks(outer["config"], old, f"adapter/{old}/", Ledger(shapes), base)
        plans = {branch: plan.fused() for branch, plan in own.items()}
    except AdapterError as error:
        raise OptionError("adapters", f"{folder}: {error}") from None
    return Member(name, old, files, {branch: plan.build(files.tensors) for branch, plan in plans.items()})


def _placed(part: Bottleneck, device: torch.device) -> Bottleneck:
    return mapped(part, lambda tensor: tensor.to(device, torch.float32))


FUSION = Method(
    name="fusion",
    summary="attention over bottlenecks that were trained before",
    config_class=FusionConfig,
    attach=_attach,
    # 6.5e-5 at width 768, where AdapterHub takes 5e-5. It starts from what works, and scores are products of what two
    # matrices give: at three times this rate the loss jumps after some hundred steps.
    learning_rate=lambda hidden_size: 0.05 / hidden_size,
)
