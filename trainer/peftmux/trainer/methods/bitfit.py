"""BitFit (Zaken et al., 2022, arXiv 2106.10199): the biases of the base, trained; nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from peftmux.adapters.methods.whole import QUERY_INTERMEDIATE
from peftmux.adapters.norms import norm_layers, vectors
from peftmux.adapters.torch_base import TorchBase
from peftmux.kernels.lowrank import LinearPart
from peftmux.kernels.norms import NormPart, apply_norm_part
from peftmux.trainer.errors import OptionError
from peftmux.trainer.host.host import Change
from peftmux.trainer.methods.base import AttachContext, AttachedAdapter, Method
from peftmux.trainer.methods.linear import LinearChange

_FUSED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "gate_up_proj")


@dataclass(frozen=True, kw_only=True)
class BitfitConfig:
    """BitFit's options."""

    bias_terms: Literal["all", "query_intermediate"] = field(
        default="all",
        metadata={"help": "every bias, or those of query projections and of feed-forward blocks' first layers alone"},
    )


class LinearBias(LinearChange):
    """bias: [out], from the base's, in its place."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        base: Tensor = layer.bias  # type: ignore[assignment]
        self._base = (base,)  # no parameter: it is the base's
        self.bias = nn.Parameter(base.detach().float().clone())

    def part(self) -> LinearPart:
        return LinearPart(bias=self.bias - self._base[0].detach())

    def file_tensors(self) -> Mapping[str, Tensor]:
        return {"bias": self.bias}


class NormBias(Change):
    """bias: [D], from the base's, in its place."""

    replaces = True

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self._norm = (norm,)  # no submodule: it is the base's
        self.bias = nn.Parameter(norm.bias.detach().float().clone())  # type: ignore[operator]

    def after(self, y: Tensor | None, x: Tensor) -> Tensor:
        norm = self._norm[0]
        return apply_norm_part(norm, x, NormPart(bias=self.bias.to(norm.get_parameter("bias").dtype)))

    def file_tensors(self) -> Mapping[str, Tensor]:
        return {"bias": self.bias}


def _attach(model: Any, config: BitfitConfig, context: AttachContext) -> AttachedAdapter:
    sites = TorchBase(model).linear_sites.values()
    linear = {site.name: model.get_submodule(site.name) for site in sites if site.has_bias}
    norms = {name: norm for name, norm in norm_layers(model).items() if "bias" in vectors(norm)}
    if config.bias_terms == "query_intermediate":
        linear, norms = {name: layer for name, layer in linear.items() if name.endswith(QUERY_INTERMEDIATE)}, {}
    if not linear and not norms:
        which = "biases" if config.bias_terms == "all" else "biases of query and intermediate layers"
        raise OptionError(
            "method", f"bitfit trains {which}, of which {type(model).__name__} has none here: train ln or lora instead"
        )
    changes: dict[str, Change] = {name: LinearBias(layer) for name, layer in linear.items()}
    changes |= {name: NormBias(norm) for name, norm in norms.items()}
    fields = {"peft_type": "BITFIT", "bias_terms": config.bias_terms}
    return AttachedAdapter("bitfit", model, changes, fields, notes=_notes(config, linear))


def _notes(config: BitfitConfig, linear: Mapping[str, nn.Module]) -> tuple[str, ...]:
    fused = sorted({name.rpartition(".")[2] for name in linear if name.endswith(_FUSED)})
    if config.bias_terms == "all" or not fused:
        return ()
    return (f"{', '.join(fused)} hold several projections in one layer: all of their biases are trained",)


BITFIT = Method(
    name="bitfit",
    summary="the biases of the base, for bases that have some",
    config_class=BitfitConfig,
    attach=_attach,
    learning_rate=lambda hidden_size: min(0.1, 15 / hidden_size),  # 4e-3 at width 4096; biases are few and move freely
)
