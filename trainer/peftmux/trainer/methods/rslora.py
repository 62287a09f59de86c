"""rsLoRA (Kalajdzievski, 2023, arXiv 2312.03732): LoRA scaled by alpha / sqrt(r), so that large ranks learn as fast."""

from __future__ import annotations

from dataclasses import dataclass, field

from peftmux.trainer.methods.base import Method
from peftmux.trainer.methods.lora import LoraConfig, attach_lora, default_learning_rate


@dataclass(frozen=True, kw_only=True)
class RsLoraConfig(LoraConfig):
    """LoRA's options; the scale at the default rank is near LoRA's default."""

    lora_alpha: float = field(default=8, metadata={"help": "the update is scaled by lora_alpha / sqrt(r)"})
    use_rslora: bool = field(default=True, init=False)


RSLORA = Method(
    name="rslora",
    summary="LoRA with the rank-stabilised scale",
    config_class=RsLoraConfig,
    attach=lambda model, config, context: attach_lora("rslora", model, config, context),
    learning_rate=default_learning_rate,
)
