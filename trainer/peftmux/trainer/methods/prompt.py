"""Prompt tuning (Lester et al., 2021, arXiv 2104.08691): trained vectors in front of the input's embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftmux.trainer.data.encode import IGNORED
from peftmux.trainer.errors import OptionError
from peftmux.trainer.host.host import Change
from peftmux.trainer.host.sites import path_of
from peftmux.trainer.methods.base import AttachContext, AttachedAdapter, Method

TENSOR = "prompt_embeddings"


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Prompt tuning's options."""

    num_virtual_tokens: int = field(default=20, metadata={"help": "how many vectors"})
    prompt_init: Literal["data", "text", "vocabulary", "labels", "random"] = field(
        default="data",
        metadata={
            "help": "start from the embeddings of the training data's first tokens, of --prompt-init-text, of drawn "
            "tokens, of the class labels (what the data's completions are), or from random vectors of their size"
        },
    )
    prompt_init_text: str | None = field(default=None, metadata={"help": "the text to start from"})

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1:
            raise OptionError("num-virtual-tokens", f"expected 1 or more, got {self.num_virtual_tokens}")
        if (self.prompt_init == "text") != (self.prompt_init_text is not None):
            raise OptionError("prompt-init-text", "expected a text with --prompt-init text, and only then")


class VirtualEmbeddings(Change):
    """At the input embedding: ids from `vocabulary` on are rows of the table that `source` computes, [n, D]."""

    def __init__(self, source: nn.Module, vocabulary: int) -> None:
        super().__init__()
        self._source = (source,)  # no submodule: the adapter holds it
        self._vocabulary = vocabulary
        self._drops = any(isinstance(m, nn.RNNBase) and m.dropout > 0 for m in source.modules())

    @property
    def draws(self) -> bool:
        return self._drops and self._source[0].training

    def before(self, x: Tensor) -> Tensor:
        return x.clamp(max=self._vocabulary - 1)

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        virtual = (x - self._vocabulary).clamp_min(0)
        table: Tensor = self._source[0]()
        return torch.where((x >= self._vocabulary).unsqueeze(-1), table.to(y.dtype)[virtual], y)


class Leading:
    """Virtual tokens in front of every row."""

    def __init__(self, count: int, vocabulary: int) -> None:
        self._ids = torch.arange(vocabulary, vocabulary + count)

    def insert(self, ids: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        front = self._ids.to(ids.device).expand(ids.shape[0], -1)
        new = torch.cat([front, ids], 1)
        return new, None if labels is None else torch.cat([torch.full_like(front, IGNORED), labels], 1)


class Table(nn.Module):
    """The vectors themselves: [n, D]."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(rows.detach().float().clone())

    def forward(self) -> Tensor:
        return self.embeddings


class PromptAdapter(AttachedAdapter):
    """`source` computes the vectors [n, D]: the table itself, or an encoder that is thrown away after training."""

    def __init__(self, kind: str, model: Any, source: nn.Module, fields: Mapping[str, object]) -> None:
        with torch.no_grad():
            count = source().shape[0]
        self._source = source
        self._join(count, model.get_input_embeddings().num_embeddings)
        path, change = virtual_embeddings(model, source)
        super().__init__(kind, model, {path: change}, fields, {"virtual tokens": source})

    def _join(self, count: int, vocabulary: int) -> None:
        """Where the vectors stand."""
        self.virtual = Leading(count, vocabulary)

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        training = self._source.training
        rows: Tensor = self._source.eval()()
        self._source.train(training)
        return {TENSOR: rows.float().cpu()}


def virtual_embeddings(model: Any, source: nn.Module) -> tuple[str, VirtualEmbeddings]:
    """The input embedding's path, and what is changed there for ids that follow the vocabulary."""
    table = model.get_input_embeddings()
    return path_of(model, table), VirtualEmbeddings(source, table.num_embeddings)


def prompt_fields(model: Any, peft_type: str, count: int) -> dict[str, object]:
    """What PEFT's configs of prompt methods hold."""
    config = model.config.get_text_config()
    return {
        "peft_type": peft_type,
        "num_virtual_tokens": count,
        "token_dim": model.get_input_embeddings().weight.shape[1],  # a projection may follow
        "num_transformer_submodules": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
    }


@torch.no_grad()
def initial_rows(model: Any, config: PromptConfig, context: AttachContext) -> Tensor:
    """[n, D] float32. Random ones have the spread of the base's embeddings."""
    table: Tensor = model.get_input_embeddings().weight
    count = config.num_virtual_tokens
    if config.prompt_init == "random":
        generator = torch.Generator().manual_seed(context.seed)
        drawn = torch.randn(count, table.shape[1], generator=generator)
        return drawn.to(table.device) * table.float().std()
    ids = context.filled(_initial_ids(config, context), count, table.shape[0])
    return table[torch.tensor(ids, device=table.device)].float()


def _initial_ids(config: PromptConfig, context: AttachContext) -> Sequence[int]:
    """Empty: to be drawn from the vocabulary."""
    if config.prompt_init == "text":
        return context.text_ids("prompt-init-text", config.prompt_init_text or "")
    if config.prompt_init == "labels":
        return _label_ids(context)
    if config.prompt_init == "data":
        return context.first_ids(config.num_virtual_tokens)
    return ()


def _label_ids(context: AttachContext) -> list[int]:
    """The tokens of a classifier's label names, or those that completions consist of, most frequent first."""
    if context.labels:
        return [i for name in context.labels for i in (context.tokenize(name) if context.tokenize else [])]
    counts: dict[int, int] = {}
    for example in context.examples:
        for label in example.labels:
            if label != IGNORED:
                counts[label] = counts.get(label, 0) + 1
    return sorted(counts, key=lambda i: (-counts[i], i))


def _attach(model: Any, config: PromptConfig, context: AttachContext) -> AttachedAdapter:
    fields = {**prompt_fields(model, "PROMPT_TUNING", config.num_virtual_tokens), "prompt_tuning_init": "RANDOM"}
    return PromptAdapter("prompt", model, Table(initial_rows(model, config, context)), fields)


PROMPT = Method(
    name="prompt",
    summary="trained vectors in front of the input",
    config_class=PromptConfig,
    attach=_attach,
    learning_rate=lambda hidden_size: 1e-2,
)
