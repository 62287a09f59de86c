"""LN tuning (Qi et al., 2022, arXiv 2211.08682): the weights (and biases) of the normalisation layers, trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from peftmux.adapters.norms import norm_layers, vectors
from peftmux.trainer.errors import OptionError
from peftmux.trainer.host.sites import is_named, spelled_out
from peftmux.trainer.methods.base import AttachContext, AttachedAdapter, Method
from peftmux.trainer.methods.layers import WholeNorm


@dataclass(frozen=True, kw_only=True)
class LnConfig:
    """LN tuning's options, in PEFT's names."""

    target_modules: list[str] | None = field(
        default=None, metadata={"help": "last names of the norms; default: every norm of the base"}
    )


class NormChange(WholeNorm):
    def file_tensors(self) -> Mapping[str, Tensor]:
        return {f"ln_tuning_layers.{name}": value for name, value in self.values.items()}


def _why_none(model: Any) -> str:
    """Of a base without norms that `norm_layers` finds."""
    kinds = {type(m).__name__: bool(vectors(m)) for m in model.modules() if "Norm" in type(m).__name__}
    base = type(model).__name__
    if not kinds:
        return f"ln trains normalisation layers, of which {base} has none: train lora instead"
    names = ", ".join(sorted(kinds))
    if not any(kinds.values()):
        return f"ln trains the weights of normalisation layers; those of {base} ({names}) have none: train lora instead"
    return f"ln trains norms that a server can change; it changes no {names}, which {base} has: train lora instead"


def _attach(model: Any, config: LnConfig, context: AttachContext) -> AttachedAdapter:
    norms = norm_layers(model)
    if not norms:
        raise OptionError("method", _why_none(model))
    wanted = config.target_modules
    if wanted is not None:
        norms = {n: m for n, m in norms.items() if any(is_named(n, w) for w in wanted)}
    if not norms:
        raise OptionError("target-modules", f"expected names of normalisation layers, got {wanted}")
    changes = {name: NormChange(norm) for name, norm in norms.items()}
    fields = {"peft_type": "LN_TUNING", "target_modules": spelled_out(model, list(norms)), "exclude_modules": None}
    return AttachedAdapter("ln", model, changes, fields)


LN = Method(
    name="ln",
    summary="the weights of the normalisation layers",
    config_class=LnConfig,
    attach=_attach,
    # 4.4e-3 at width 4096. Weights near one move far, and more is forgotten than learned from 0.1 on.
    learning_rate=lambda hidden_size: min(7e-2, 18 / hidden_size),
)
