"""Some layers trained whole, the rest frozen (Lee et al., 2019, arXiv 1911.03090: the last quarter is nearly enough).

The file holds the trained weights and biases alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peftmux.adapters.norms import norm_layers, vectors
from peftmux.adapters.quantised import dequantised, is_quantised
from peftmux.adapters.tables import table_scale
from peftmux.adapters.torch_base import TorchBase
from peftmux.kernels.embedding import EmbeddingPart, apply_embedding_part, scaled_part
from peftmux.kernels.norms import NormPart, apply_norm_part
from peftmux.trainer.errors import OptionError
from peftmux.trainer.host.host import Change
from peftmux.trainer.host.sites import is_named
from peftmux.trainer.methods.base import AttachContext, AttachedAdapter, Method
from peftmux.trainer.methods.linear import expert_notes

_FEWEST = 2
"""Blocks trained by default: heads that copy from where another token stands take two (Olsson et al., 2022,
arXiv 2209.11895)."""


@dataclass(frozen=True, kw_only=True)
class LayersConfig:
    """Which blocks are trained, and what of them."""

    trained_layers: list[int] | None = field(
        default=None, metadata={"help": "numbers of blocks, from 0; default: the last quarter of them, at least two"}
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "names of modules instead of whole blocks, e.g. lm_head; with --trained-layers only in these"
        },
    )


class WholeChange(Change):
    """A module's own parameters, trained from the base's values as the base stores them, in their place."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = (module,)  # no submodule: it is the base's
        own = {name: p.detach() for name, p in module.named_parameters(recurse=False)}
        if is_quantised(module):
            own["weight"] = dequantised(module)
        self.values = nn.ParameterDict({name: nn.Parameter(p.float().clone()) for name, p in own.items()})

    def file_tensors(self) -> Mapping[str, Tensor]:
        return dict(self.values.items())


class WholeLinear(WholeChange):
    replaces = True

    def after(self, y: Tensor | None, x: Tensor) -> Tensor:
        weight = self.values["weight"] if isinstance(self._module[0], nn.Linear) else self.values["weight"].T
        out = linear(x.to(weight.dtype), weight, self.values.get("bias"))
        return out if torch.is_autocast_enabled(x.device.type) else out.to(x.dtype)


class WholeNorm(WholeChange):
    replaces = True

    def after(self, y: Tensor | None, x: Tensor) -> Tensor:
        norm = self._module[0]
        values = {name: value.to(norm.get_parameter(name).dtype) for name, value in self.values.items()}
        return apply_norm_part(norm, x, NormPart(**values))


class WholeEmbedding(WholeChange):
    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._factor = table_scale(module) or 1.0

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        return apply_embedding_part(y, x, scaled_part(EmbeddingPart(rows=self.values["weight"]), self._factor))


def _attach(model: Any, config: LayersConfig, context: AttachContext) -> AttachedAdapter:
    found = _trainable(model)
    blocks = model.config.get_text_config().num_hidden_layers
    layers = config.trained_layers
    if layers is None and config.target_modules is None:
        layers = list(range(blocks - min(blocks, max(_FEWEST, math.ceil(blocks / 4))), blocks))
    chosen = _chosen(found, layers, config.target_modules, blocks)
    changes = {name: found[name](model.get_submodule(name)) for name in chosen}
    fields = {"peft_type": "LAYERS", "target_modules": sorted(chosen), "trained_layers": layers}
    return AttachedAdapter("layers", model, changes, fields, notes=expert_notes(model))


def _trainable(model: Any) -> dict[str, type[WholeChange]]:
    """What the file format can hold: linear layers, norms, the input embedding where it is a plain table."""
    base = TorchBase(model)
    found: dict[str, type[WholeChange]] = dict.fromkeys(base.linear_sites, WholeLinear)
    found |= dict.fromkeys((name for name, norm in norm_layers(model).items() if vectors(norm)), WholeNorm)
    return {**found, base.embedding: WholeEmbedding} if base.embedding else found


def _chosen(
    found: Mapping[str, object], layers: Sequence[int] | None, names: Sequence[str] | None, blocks: int
) -> list[str]:
    chosen = list(found)
    if layers is not None:
        if odd := [layer for layer in layers if not 0 <= layer < blocks]:
            raise OptionError("trained-layers", f"expected numbers from 0 to {blocks - 1}, got {odd[0]}")
        wanted = set(map(str, layers))
        chosen = [name for name in chosen if _block(name) in wanted]
    if names is not None:
        for wanted_name in names:
            if not any(is_named(name, wanted_name) for name in chosen):
                raise OptionError("target-modules", f"no module that can be trained is named {wanted_name!r} there")
        chosen = [name for name in chosen if any(is_named(name, wanted_name) for wanted_name in names)]
    return chosen


def _block(name: str) -> str | None:
    """The number of the block that a module is in: the first number of its path."""
    return next((piece for piece in name.split(".") if piece.isdigit()), None)


LAYERS = Method(
    name="layers",
    summary="the last layers of the base whole (or others, or single modules)",
    config_class=LayersConfig,
    attach=_attach,
    # Adam's best rate for whole matrices falls with their width (Yang et al., 2022, arXiv 2203.03466): 7e-5 at 4096.
    learning_rate=lambda hidden_size: 0.3 / hidden_size,
)
