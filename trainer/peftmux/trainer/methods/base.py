"""What a training method is: a configuration, and an adapter attached to a live model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftmux.adapters.methods.ledger import PREFIX
from peftmux.trainer.data import Example
from peftmux.trainer.errors import OptionError
from peftmux.trainer.host.host import Change, Host
from peftmux.trainer.host.inputs import PrefixSource, SeesBothWays, VirtualTokens

if TYPE_CHECKING:
    from peftmux.trainer.methods.task_head import TaskHead

_KEYS = itertools.count()


@dataclass(frozen=True, slots=True)
class AttachContext:
    """What a method may use to initialise its tensors: the training data, and the base's tokenizer.

    tokenize: text -> ids, without special tokens; None where there is no tokenizer. labels: a classifier's names.
    task: as `RunOptions.task`.
    """

    seed: int
    examples: Sequence[Example] = ()
    tokenize: Callable[[str], list[int]] | None = None
    labels: tuple[str, ...] = ()
    task: str = "generation"

    def text_ids(self, option: str, text: str) -> list[int]:
        """Raises OptionError where there are none."""
        ids = self.tokenize(text) if self.tokenize else []
        if not ids:
            raise OptionError(option, f"expected text with tokens, got {text!r}")
        return ids

    def first_ids(self, count: int) -> list[int]:
        """Of the training data, so many or all."""
        return list(itertools.islice((i for example in self.examples for i in example.input_ids), count))

    def filled(self, ids: Sequence[int], count: int, vocabulary: int) -> list[int]:
        """So many: from the beginning again where they are too few, drawn where there are none."""
        if not ids:
            generator = torch.Generator().manual_seed(self.seed)
            ids = torch.randint(vocabulary, (count,), generator=generator).tolist()
        return list(itertools.islice(itertools.cycle(ids), count))


class AttachedAdapter:
    """An adapter in a live model. While it is attached the model computes with it; only its tensors are trainable.

    Trainable tensors are float32, on the model's device. A method builds one from what it changes; it subclasses where
    it follows the training (`after_step`) or stores something else than it trains (`tensors`).
    """

    prefix: PrefixSource | None = None
    virtual: VirtualTokens | None = None
    sees_both_ways: SeesBothWays | None = None
    """Says which tokens see each other whatever their order."""
    takes_images = False
    """Rows of its data may have images, which `place` puts among their tokens."""
    has_phases = False
    """What its steps do depends on the run's length: it cannot go on as a longer run."""
    has_files = True
    """What it would write can be told before its training has ended."""
    head: nn.Module | None = None
    """A classifier on the final hidden states, whose scores the loss is of."""

    def __init__(
        self,
        kind: str,
        model: Any,
        changes: Mapping[str, Change],
        fields: Mapping[str, object],
        modules: Mapping[str, nn.Module] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """changes: by module path. modules: what else is trained (encoders, prefixes). fields: of adapter_config.json.

        A subclass sets `prefix` or `virtual` before it calls this.
        """
        self.kind = kind
        self.key = f"job{next(_KEYS)}"
        self.changes = dict(changes)
        self.modules = nn.ModuleDict(modules or {})
        self.notes = tuple(notes)
        """What the user should know of this method on this base."""
        self._model = model
        self._fields = dict(fields)
        self._host = Host.of(model)
        self._host.add(self)

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Everything trained, by name; at a place of the base as the file names it."""
        named = self._changes_tensors().items()
        found = {name: t for name, t in named if isinstance(t, nn.Parameter) and t.requires_grad}
        known = {id(parameter) for parameter in found.values()}
        for place, module in [*self.changes.items(), *self.modules.items()]:
            for name, parameter in module.named_parameters():
                if parameter.requires_grad and id(parameter) not in known:
                    known.add(id(parameter))
                    found[f"{place}.{name}"] = parameter
        return found

    def peft_config(self) -> dict[str, object]:
        """The fields of adapter_config.json that this method decides."""
        return dict(self._fields)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of adapter_model.safetensors, float32 on the CPU; may share memory with the parameters."""
        named = self._changes_tensors().items()
        return {name: t.detach().float().cpu() if t.is_floating_point() else t.cpu() for name, t in named}

    def _changes_tensors(self) -> dict[str, Tensor]:
        """What stands at places of the base, as the file names it."""
        changes = self.changes.items()
        return {f"{PREFIX}{place}.{key}": t for place, c in changes for key, t in c.file_tensors().items()}

    def folder(self, base_model: str, head: TaskHead | None = None) -> dict[str, bytes] | None:
        """All files of the adapter by name, where they are not PEFT's two. `head` goes with it."""
        return None

    def sites(self) -> Mapping[str, int]:
        """Trainable parameters by the place of the base model they act on, or by the module that holds them."""
        places = [*self.changes.items(), *self.modules.items()]
        counts = {name: sum(p.numel() for p in module.parameters() if p.requires_grad) for name, module in places}
        return {name: count for name, count in counts.items() if count}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep for a run to go on exactly: every parameter and persistent buffer, by name."""
        places = [*self.changes.items(), *self.modules.items()]
        return {f"{place}/{name}": tensor for place, module in places for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Bring back what `state` gave. KeyError for a tensor that is not stored."""
        for name, tensor in self.state().items():
            tensor.copy_(stored[name])

    def optimizer_groups(self, weight_decay: float, learning_rate: float) -> list[dict[str, Any]]:
        """Parameter groups as torch optimisers take them; a group without "lr" has the run's."""
        return [{"params": list(self.parameters.values()), "weight_decay": weight_decay}]

    def before_pass(self, labels: Tensor | None) -> None:
        """The micro-batch's, [B, K] of the last K positions: with label smoothing the model is not given them."""

    def regulariser(self) -> Tensor | None:
        """What the method adds to the loss, a scalar; None: nothing."""
        return None

    def place(self, example: Example) -> Example:
        """A row of the data with the virtual tokens that this method has in it. OptionError where they do not fit."""
        return example

    def before_step(self, step: int, total: int) -> None:
        """An optimiser step begins. `step` counts from 0, `total` is how many the run has."""

    def after_step(self, step: int, total: int) -> None:
        """The optimiser has moved."""

    def training_ended(self) -> None:
        """The last step is done, or the best checkpoint is back: what is left to do before evaluation and export."""

    def scores(self, logits: Tensor, hidden: Tensor | None, vocab_size: int) -> tuple[Tensor, int]:
        """What the loss is of, [..., C], and C: the model's logits [..., vocab_size], or a classifier's of `hidden`."""
        return logits, vocab_size

    def checkpoint_activations(self) -> bool:
        """Save activation memory by recomputing layers. False: transformers' own way works with this adapter."""
        return False

    def installed(self) -> None:
        """The host has put the adapter into the model: now, or again after `Host.aside`."""

    def removed(self) -> None:
        """The host has taken it out."""

    def detach(self) -> None:
        """Give the model back as it was (its own parameters stay frozen)."""
        self._host.remove(self)


@dataclass(frozen=True, slots=True)
class Method:
    """One way to train an adapter.

    config_class: a dataclass of the method's own options, in PEFT's names.
    attach: (model, configuration, context) -> the adapter; raises OptionError where it does not fit the model.
    learning_rate: the default for a base of this hidden size.
    rate_factor: (configuration, hidden size) -> what the default is multiplied by.
    places_tokens: configuration -> whether the adapter's `place` puts tokens of its own into the rows of the data.
    """

    name: str
    summary: str
    config_class: type[Any]
    attach: Callable[[Any, Any, AttachContext], AttachedAdapter]
    learning_rate: Callable[[int], float]
    rate_factor: Callable[[Any, int], float] = lambda config, hidden_size: 1.0
    places_tokens: Callable[[Any], bool] = lambda config: False

    def default_rate(self, config: Any, hidden_size: int) -> float:
        return self.learning_rate(hidden_size) * self.rate_factor(config, hidden_size)
