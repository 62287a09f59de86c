"""P-Tuning (Liu et al., 2021, arXiv 2103.10385): virtual tokens that an encoder computes while training.

The encoder is part of a checkpoint and no part of the adapter, whose file holds what it computes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftmux.adapters.parts import TokenGroup
from peftmux.adapters.template import PromptTooShort, inserts
from peftmux.trainer.data import Example
from peftmux.trainer.errors import OptionError
from peftmux.trainer.methods.base import AttachContext, AttachedAdapter, Method
from peftmux.trainer.methods.prompt import PromptAdapter, PromptConfig, initial_rows, prompt_fields

_GROUP = re.compile(r"([1-9]\d{0,5})@(-?\d{1,6})")


@dataclass(frozen=True, kw_only=True)
class PTuningConfig(PromptConfig):
    """P-Tuning's options, in PEFT's names."""

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = field(default="MLP", metadata={"help": "the encoder"})
    encoder_hidden_size: int | None = field(default=None, metadata={"help": "its width; default: the base's"})
    encoder_num_layers: int = field(default=2, metadata={"help": "of the LSTM"})
    encoder_dropout: float = field(default=0.0, metadata={"help": "between the LSTM's layers"})
    template: list[str] | None = field(
        default=None,
        metadata={
            "help": "where the virtual tokens stand instead of in front: groups COUNT@PLACE, e.g. 3@0 2@-1; 0 is "
            "before a prompt's first token, -1 after its last"
        },
    )

    def __post_init__(self) -> None:
        if self.template is not None:  # which says how many there are
            object.__setattr__(self, "num_virtual_tokens", sum(group.tokens for group in self.groups))
        super().__post_init__()
        for name in ("encoder_hidden_size", "encoder_num_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(name.replace("_", "-"), f"expected 1 or more, got {value}")
        if not 0.0 <= self.encoder_dropout < 1.0:
            raise OptionError("encoder-dropout", f"expected 0 or more and below 1, got {self.encoder_dropout}")

    @property
    def groups(self) -> tuple[TokenGroup, ...]:
        return tuple(_group(text) for text in self.template or ())


def _group(text: str) -> TokenGroup:
    match = _GROUP.fullmatch(text)
    if match is None:
        raise OptionError("template", f"expected groups COUNT@PLACE, e.g. 3@0 or 2@-1; got {text!r}")
    return TokenGroup(int(match[1]), int(match[2]))


class TemplateAdapter(PromptAdapter):
    """Virtual tokens in groups before, inside of and after the prompt of each row of the data."""

    groups: tuple[TokenGroup, ...]

    def _join(self, count: int, vocabulary: int) -> None:
        self._first = vocabulary

    def place(self, example: Example) -> Example:
        try:
            places = inserts(self.groups, example.prompt)
        except PromptTooShort as error:
            raise OptionError("template", str(error)) from None
        return example.with_inserted((index, [self._first + token for token in tokens]) for index, tokens in places)


class Encoder(nn.Module):
    """embedding [n, D] -> (bidirectional LSTM ->) MLP, added to the embedding: [n, D].

    The paper's encoder has no such sum. With it the virtual tokens start as the tokens they were initialised from
    (the MLP's last layer starts at zero), which small bases learn far faster from.
    """

    def __init__(self, rows: Tensor, config: PTuningConfig, generator_seed: int) -> None:
        super().__init__()
        width = rows.shape[1]
        hidden = config.encoder_hidden_size or width
        self.embedding = nn.Parameter(rows.clone())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_seed)
            self.lstm = _lstm(width, hidden, config) if config.encoder_reparameterization_type == "LSTM" else None
            inner = 2 * hidden if self.lstm else hidden
            first = [] if self.lstm else [nn.Linear(width, hidden), nn.ReLU()]
            self.mlp = nn.Sequential(*first, nn.Linear(inner, inner), nn.ReLU(), nn.Linear(inner, width))
        nn.init.zeros_(self.mlp[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.mlp[-1].bias)  # type: ignore[arg-type]
        self.to(rows.device)

    def forward(self) -> Tensor:
        x = self.embedding.unsqueeze(0)
        if self.lstm is not None:
            x = self.lstm(x)[0]
        out: Tensor = self.embedding + self.mlp(x)[0]
        return out


def _lstm(width: int, hidden: int, config: PTuningConfig) -> nn.LSTM:
    layers, drop = config.encoder_num_layers, config.encoder_dropout
    return nn.LSTM(width, hidden, layers, dropout=drop if layers > 1 else 0.0, bidirectional=True, batch_first=True)


def _attach(model: Any, config: PTuningConfig, context: AttachContext) -> AttachedAdapter:
    groups = config.groups
    if groups and context.task != "generation":
        raise OptionError("template", f"is for generation, which a server has it for; got --task {context.task}")
    rows = initial_rows(model, config, context)
    encoder = Encoder(rows, config, context.seed)
    own: dict[str, object] = {"template": [{"tokens": g.tokens, "at": g.at} for g in groups]} if groups else {}
    fields = {
        **prompt_fields(model, "P_TUNING_TEMPLATE" if groups else "P_TUNING", config.num_virtual_tokens),
        **own,
        "encoder_reparameterization_type": config.encoder_reparameterization_type,
        "encoder_hidden_size": config.encoder_hidden_size or rows.shape[1],
        "encoder_num_layers": config.encoder_num_layers,
        "encoder_dropout": config.encoder_dropout,
    }
    if not groups:
        return PromptAdapter("p-tuning", model, encoder, fields)
    adapter = TemplateAdapter("p-tuning", model, encoder, fields)
    adapter.groups = groups
    return adapter


P_TUNING = Method(
    name="p-tuning",
    summary="virtual tokens computed by an encoder while training",
    config_class=PTuningConfig,
    attach=_attach,
    learning_rate=lambda hidden_size: 3e-3,
    places_tokens=lambda config: bool(config.groups),
)
