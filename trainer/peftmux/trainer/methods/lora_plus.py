"""LoRA+ (Hayou et al., 2024, arXiv 2402.12354): LoRA whose B learns faster than its A."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peftmux.trainer.errors import OptionError
from peftmux.trainer.methods.base import AttachContext, AttachedAdapter, Method
from peftmux.trainer.methods.lora import LoraConfig, attach_lora, default_learning_rate


@dataclass(frozen=True, kw_only=True)
class LoraPlusConfig(LoraConfig):
    """LoRA's options, and how much faster B learns."""

    loraplus_lr_ratio: float = field(default=16.0, metadata={"help": "B's learning rate over A's"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.loraplus_lr_ratio >= 1:
            raise OptionError("loraplus-lr-ratio", f"expected 1 or more, got {self.loraplus_lr_ratio}")


class LoraPlusAdapter(AttachedAdapter):
    """Two parameter groups. The run's learning rate is B's; A's is that divided by the ratio."""

    ratio: float

    def optimizer_groups(self, weight_decay: float, learning_rate: float) -> list[dict[str, Any]]:
        fast = [p for name, p in self.parameters.items() if "lora_B" in name]
        slow = [p for name, p in self.parameters.items() if "lora_B" not in name]
        return [
            {"params": slow, "weight_decay": weight_decay, "lr": learning_rate / self.ratio},
            {"params": fast, "weight_decay": weight_decay},
        ]


def _attach(model: Any, config: LoraPlusConfig, context: AttachContext) -> AttachedAdapter:
    adapter = attach_lora("lora", model, config, context, adapter=LoraPlusAdapter)
    assert isinstance(adapter, LoraPlusAdapter)
    adapter.ratio = config.loraplus_lr_ratio
    return adapter


LORA_PLUS = Method(
    name="lora-plus",
    summary="LoRA whose B learns faster than its A",
    config_class=LoraPlusConfig,
    attach=_attach,
    learning_rate=lambda hidden_size: 4 * default_learning_rate(hidden_size),  # so that A's is a quarter of LoRA's
)
