"""DoRA (Liu et al., 2024, arXiv 2402.09353): LoRA on a weight split into direction and a trained magnitude."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peftmux.adapters.methods.dora import dora_out_scale
from peftmux.kernels.lowrank import LinearPart
from peftmux.trainer.errors import OptionError
from peftmux.trainer.methods.base import Method
from peftmux.trainer.methods.linear import weight_out_in
from peftmux.trainer.methods.lora import LoraConfig, LoraLinear, attach_lora, default_learning_rate


class DoraLinear(LoraLinear):
    """Magnitude: [out], starting at the norms of the base weight's rows, so that the first step starts from the base.

    The norm of the updated weight is a constant to the gradient (section 4.3 of the paper).
    """

    low_rank_alone = False
    squares: Tensor
    """[out]: of the base weight's rows, which stay as they are."""

    def __init__(self, base_layer: nn.Module, rank: int, scale: float, drop: float, generator: torch.Generator) -> None:
        super().__init__(base_layer, rank, scale, drop, generator)
        self._base = (base_layer,)  # no submodule: it is the base's
        squares = weight_out_in(base_layer).float().square().sum(dim=1)
        if not squares.all():
            raise OptionError(
                "method", "dora divides by the norm of each output feature's weight; this base has a zero"
            )
        self.register_buffer("squares", squares, persistent=False)
        self.magnitude = nn.Parameter(squares.sqrt())

    def part(self) -> LinearPart:
        out_scale = self._out_scale()
        bias: Tensor | None = self._base[0].bias  # type: ignore[assignment]
        delta = None if bias is None else bias - out_scale * bias  # the base's bias is not scaled
        return LinearPart(self.lora_A, self.lora_B, self.scale, out_scale, delta)

    def _out_scale(self) -> Tensor:
        weight = weight_out_in(self._base[0])
        a, b = self.lora_A.detach(), self.lora_B.detach()
        return dora_out_scale(weight, a, b, self.scale, self.magnitude, self.squares)

    def file_tensors(self) -> Mapping[str, Tensor]:
        return {**super().file_tensors(), "lora_magnitude_vector": self.magnitude}


DORA = Method(
    name="dora",
    summary="LoRA with a trained magnitude per output feature",
    config_class=LoraConfig,
    attach=lambda model, config, context: attach_lora("dora", model, config, context, DoraLinear, use_dora=True),
    learning_rate=default_learning_rate,
)
