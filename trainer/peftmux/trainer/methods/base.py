"""What a training method is: a configuration, and an adapter attached to a live model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peftmux.trainer.data import Example


@dataclass(frozen=True, slots=True)
class AttachContext:
    """What a method may use to initialise its tensors: the training data, and the base's tokenizer.

    tokenize: text -> ids, without special tokens; None where there is no tokenizer.
    """

    seed: int
    examples: Sequence[Example] = ()
    tokenize: Callable[[str], list[int]] | None = None


class AttachedAdapter(ABC):
    """An adapter in a live model. While it is attached the model computes with it; only its tensors are trainable.

    It owns the trainable parameters: float32, on the model's device, under the names they have in the adapter's file.
    """

    kind: str
    parameters: Mapping[str, nn.Parameter]
    notes: tuple[str, ...] = ()
    """What the user should know of this method on this base."""

    @abstractmethod
    def peft_config(self) -> dict[str, object]:
        """The fields of adapter_config.json that this method decides."""

    @abstractmethod
    def sites(self) -> Mapping[str, int]:
        """Trainable parameters by the place of the base model they act on."""

    @abstractmethod
    def detach(self) -> None:
        """Give the model back as it was (its own parameters stay frozen)."""

    def checkpoint_activations(self) -> bool:
        """Save activation memory by recomputing layers. False: transformers' own way works with this adapter."""
        return False

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of adapter_model.safetensors, float32 on the CPU; may share memory with the parameters."""
        return {name: p.detach().float().cpu() for name, p in self.parameters.items()}

    def optimizer_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups as torch optimisers take them."""
        return [{"params": list(self.parameters.values()), "weight_decay": weight_decay}]


@dataclass(frozen=True, slots=True)
class Method:
    """One way to train an adapter.

    config_class: a dataclass of the method's own options, in PEFT's names.
    attach: (model, configuration, context) -> the adapter; raises OptionError where it does not fit the model.
    learning_rate: the default for a base of this hidden size.
    """

    name: str
    summary: str
    config_class: type[Any]
    attach: Callable[[Any, Any, AttachContext], AttachedAdapter]
    learning_rate: Callable[[int], float]
