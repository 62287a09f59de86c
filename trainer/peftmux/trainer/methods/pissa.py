"""PiSSA (Meng et al., 2024, arXiv 2404.02948): LoRA that starts from the weight's principal singular directions.

While training the base holds the rest of the weight, W - s B0 A0. Exported is a plain LoRA over the untouched base, of
twice the rank: s (B A - B0 A0) = s [B, B0] [A; -A0], as PEFT converts one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftmux.kernels.lowrank import LinearPart
from peftmux.trainer.methods.base import AttachContext, AttachedAdapter, Method
from peftmux.trainer.methods.linear import weight_out_in
from peftmux.trainer.methods.lora import LoraConfig, LoraLinear, attach_lora, default_learning_rate


class PissaLinear(LoraLinear):
    """A0: [r, in] and B0: [out, r] are the starting point, kept as buffers; the base's weight is never changed."""

    rank_bounded = True
    start_A: Tensor
    start_B: Tensor

    def __init__(self, base_layer: nn.Module, rank: int, scale: float, drop: float, generator: torch.Generator) -> None:
        super().__init__(base_layer, rank, scale, drop, generator)
        left, sizes, right = torch.linalg.svd(weight_out_in(base_layer).float(), full_matrices=False)
        root = (sizes[:rank] / scale).sqrt()
        with torch.no_grad():
            self.lora_A.copy_(root[:, None] * right[:rank])
            self.lora_B.copy_(left[:, :rank] * root)
        self.register_buffer("start_A", self.lora_A.detach().clone())
        self.register_buffer("start_B", self.lora_B.detach().clone())

    def part(self) -> LinearPart:
        return LinearPart(
            torch.cat([self.lora_A, -self.start_A]), torch.cat([self.lora_B, self.start_B], dim=1), self.scale
        )

    def file_tensors(self) -> Mapping[str, Tensor]:
        part = self.part()
        assert part.a is not None
        assert part.b is not None
        return {"lora_A.weight": part.a, "lora_B.weight": part.b}


class PissaAdapter(AttachedAdapter):
    """The file's rank and alpha are twice the trained ones, which leaves the scale as it is (rsLoRA: root of two)."""

    def peft_config(self) -> dict[str, object]:
        fields = dict(super().peft_config())
        factor = 2**0.5 if fields["use_rslora"] else 2.0
        fields["r"] = 2 * int(fields["r"])  # type: ignore[call-overload]
        fields["lora_alpha"] = factor * float(fields["lora_alpha"])  # type: ignore[arg-type]
        fields["rank_pattern"] = {k: 2 * v for k, v in fields["rank_pattern"].items()}  # type: ignore[attr-defined]
        fields["alpha_pattern"] = {k: factor * v for k, v in fields["alpha_pattern"].items()}  # type: ignore[attr-defined]
        return fields


def _attach(model: Any, config: LoraConfig, context: AttachContext) -> AttachedAdapter:
    return attach_lora("lora", model, config, context, PissaLinear, adapter=PissaAdapter)


PISSA = Method(
    name="pissa",
    summary="LoRA that starts from each weight's principal directions",
    config_class=LoraConfig,
    attach=_attach,
    learning_rate=default_learning_rate,
)
