"""Classification heads, trained beside any method: transformers' `score` or `classifier` on the final hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from peftmux.adapters.methods.ledger import PREFIX
from peftmux.adapters.torch_base import TorchBase
from peftmux.kernels.head import Head, HeadLayer, apply_head
from peftmux.trainer.data import Example
from peftmux.trainer.errors import OptionError
from peftmux.trainer.host.sites import path_of
from peftmux.trainer.methods.base import AttachedAdapter

_CLASSES = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}
TASK_TYPES = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS"}
_PROMPTS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
"""peft_types beside whose tensors PEFT saves a head directly under base_model."""


class TaskHead(nn.Module):
    """weight: [C, D], drawn from N(0, s^2) with the base's own s, bias: [C], zero, where transformers' head has one."""

    def __init__(self, model: Any, kind: Literal["sequence", "token"], labels: tuple[str, ...], seed: int) -> None:
        """Raises OptionError for a base whose final hidden states cannot be read."""
        super().__init__()
        self.kind: Literal["sequence", "token"] = kind
        self.labels = labels
        self.name, has_bias = _module_of(model, kind)
        width = TorchBase(model).state_width
        if not width:
            raise OptionError("task", f"expected a base with hidden states to classify by, got {type(model).__name__}")
        spread = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
        drawn = torch.randn(len(labels), width, generator=torch.Generator().manual_seed(seed)) * spread
        self.weight = nn.Parameter(drawn.to(model.device))
        self.bias = nn.Parameter(torch.zeros(len(labels), device=model.device)) if has_bias else None

    def forward(self, states: Tensor) -> Tensor:
        """states: [..., D] -> [..., C]."""
        return apply_head(states, Head(self.kind, HeadLayer(self.weight, self.bias), self.labels))


class HeadedAdapter(AttachedAdapter):
    """An adapter that classifies: a method's adapter with a head. The logits of the language model are not used."""

    head: TaskHead

    def __init__(self, inner: AttachedAdapter, head: TaskHead, model: Any) -> None:
        """Takes the place of `inner` in the model. Raises OptionError where that changes the output projection."""
        output = path_of(model, model.get_output_embeddings())
        if output in inner.changes:
            raise OptionError("target-modules", f"expected layers that a classifier has, which has no {output}")
        self._inner = inner
        self._beside_prompt = inner._fields["peft_type"] in _PROMPTS
        self.head = head
        self.prefix, self.virtual, self.has_files = inner.prefix, inner.virtual, inner.has_files
        self.has_phases = inner.has_phases
        self._model = model
        self.kind, self.key, self.changes, self.notes = inner.kind, inner.key, inner.changes, inner.notes
        self.modules = nn.ModuleDict({**dict(inner.modules.items()), "head": head})
        self._host = inner._host
        self._host.replace(inner, self)

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return {**self._inner.parameters, **self._head_tensors()}

    def peft_config(self) -> dict[str, object]:
        own: dict[str, object] = {
            "task_type": TASK_TYPES[self.head.kind],
            "id2label": {str(i): name for i, name in enumerate(self.head.labels)},
        }
        if not self._beside_prompt:
            own["modules_to_save"] = ["classifier", "score"]
        return {**self._inner.peft_config(), **own}

    def tensors(self) -> dict[str, Tensor]:
        head = {name: parameter.detach().cpu() for name, parameter in self._head_tensors().items()}
        return {**self._inner.tensors(), **head}

    def folder(self, base_model: str, head: TaskHead | None = None) -> dict[str, bytes] | None:
        return self._inner.folder(base_model, self.head)

    def sites(self) -> Mapping[str, int]:
        return {**self._inner.sites(), self.head.name: sum(p.numel() for p in self.head.parameters())}

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        super().restore(stored)
        self._inner.restore(stored)

    def optimizer_groups(self, weight_decay: float, learning_rate: float) -> list[dict[str, Any]]:
        own = {"params": list(self.head.parameters()), "weight_decay": weight_decay}
        groups = [group for group in self._inner.optimizer_groups(weight_decay, learning_rate) if group["params"]]
        return [*groups, own]

    def place(self, example: Example) -> Example:
        return self._inner.place(example)

    def regulariser(self) -> Tensor | None:
        return self._inner.regulariser()

    def before_step(self, step: int, total: int) -> None:
        self._inner.before_step(step, total)

    def after_step(self, step: int, total: int) -> None:
        self._inner.after_step(step, total)

    def training_ended(self) -> None:
        self._inner.training_ended()

    def checkpoint_activations(self) -> bool:
        return self._inner.checkpoint_activations()

    def installed(self) -> None:
        self._inner.installed()

    def removed(self) -> None:
        self._inner.removed()

    def scores(self, logits: Tensor, hidden: Tensor | None, vocab_size: int) -> tuple[Tensor, int]:
        assert hidden is not None, "the host reads the hidden states while a head is attached"
        return self.head(hidden), len(self.head.labels)

    def detach(self) -> None:
        self._host.replace(self, self._inner)
        self._inner.detach()

    def _head_tensors(self) -> dict[str, nn.Parameter]:
        stem = PREFIX.partition(".")[0] + "." if self._beside_prompt else PREFIX
        return {f"{stem}{self.head.name}.{name}": parameter for name, parameter in self.head.named_parameters()}


def _module_of(model: Any, kind: str) -> tuple[str, bool]:
    """(name, whether it has a bias) of the head in transformers' own classifier of this base; `score` without one."""
    known: Any = _CLASSES[kind]._model_mapping
    found = known.get(type(model.config), None)
    if found is not None:
        with torch.device("meta"):
            classifier = found(model.config)
        for name in ("score", "classifier"):
            if isinstance(layer := getattr(classifier, name, None), nn.Linear):
                return name, layer.bias is not None
    return "score", kind == "token"
