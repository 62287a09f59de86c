"""Loads a transformers causal LM, fits it with paged attention and adapter sites, and proves it unchanged."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from peftmux.adapters.base import KVShape, LinearSite
from peftmux.runtime.errors import UnsupportedModel
from peftmux.runtime.model.attention import IMPLEMENTATION
from peftmux.runtime.model.dense import choose_dense
from peftmux.runtime.model.discover import AttentionLayer, discover
from peftmux.runtime.model.rotary import pin_frequencies
from peftmux.runtime.model.sites import SiteRef
from peftmux.runtime.model.step import StepInputs, StepState
from peftmux.runtime.model.swaps import Swapper


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What a module is made of, read before its layers are swapped."""

    module_names: frozenset[str]
    parameters: int
    embedding: str
    """Path of the input embedding; "" where it is more than a table."""
    head: str | None
    """Path of the output projection where it is a plain linear layer."""
    tied: bool
    """The head's weight is the input embedding's."""

    @classmethod
    def of(cls, module: PreTrainedModel) -> Anatomy:
        paths = {id(m): name for name, m in module.named_modules() if name}
        table, head = module.get_input_embeddings(), module.get_output_embeddings()
        plain_table, plain_head = type(table) is nn.Embedding, type(head) is nn.Linear
        return cls(
            module_names=frozenset(paths.values()),
            parameters=sum(p.numel() for p in module.parameters()),
            embedding=paths[id(table)] if plain_table else "",
            head=paths[id(head)] if plain_head else None,
            tied=plain_table and plain_head and head.weight is table.weight,
        )


class LoadedModel:
    """One base model, ready to run steps. Implements `peftmux.adapters.base.BaseModel`.

    The module belongs to the thread that runs steps; names, shapes and base weights may be read from any thread.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        name: str,
        layers: Sequence[AttentionLayer],
        anatomy: Anatomy,
        swapped: Swapper,
        step: StepState,
        context_length: int,
    ) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.name = name
        self.layers = tuple(layers)
        self.anatomy = anatomy
        self.sites: Mapping[str, SiteRef] = swapped.sites
        self.embedding_site = swapped.embedding
        self.step = step
        self.context_length = context_length
        self._keeps_logits = "logits_to_keep" in inspect.signature(module.forward).parameters

    @property
    def architecture(self) -> str:
        return type(self.module).__name__

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def parameters(self) -> int:
        return self.anatomy.parameters

    @property
    def module_names(self) -> frozenset[str]:
        return self.anatomy.module_names

    @property
    def embedding(self) -> str:
        return self.anatomy.embedding

    @property
    def head(self) -> str | None:
        return self.anatomy.head if self.anatomy.head in self.sites else None

    @property
    def tied(self) -> bool:
        return self.anatomy.tied

    @cached_property
    def hidden_size(self) -> int:
        return int(self.module.config.get_text_config().hidden_size)

    @cached_property
    def vocab_size(self) -> int:
        return int(self.module.config.get_text_config().vocab_size)

    @cached_property
    def linear_sites(self) -> Mapping[str, LinearSite]:
        return {name: ref.site for name, ref in self.sites.items()}

    @cached_property
    def kv_shapes(self) -> Sequence[KVShape]:
        return tuple(layer.kv for layer in self.layers)

    @cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a generation, of the generation config or the model's config."""
        generation = getattr(self.module, "generation_config", None)
        eos = getattr(generation, "eos_token_id", None)
        if eos is None:
            eos = getattr(self.module.config.get_text_config(), "eos_token_id", None)
        ids = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
        return tuple(i for i in ids if 0 <= i < self.vocab_size)

    def weight(self, site: str) -> Tensor:
        return self.sites[site].weight()

    def bias(self, site: str) -> Tensor | None:
        return self.sites[site].bias()

    def embedding_weight(self) -> Tensor:
        weight = self.module.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def forward(self, inputs: StepInputs) -> Tensor:
        """Logits [S, V] of the kept tokens, in the model's dtype; writes the step's keys and values to the cache."""
        self.step.set(inputs)
        keep = {"logits_to_keep": inputs.keep} if self._keeps_logits else {}
        logits: Tensor = self.module(
            input_ids=inputs.ids, position_ids=inputs.positions, use_cache=False, **keep
        ).logits[0]
        return logits if self._keeps_logits else logits.index_select(0, inputs.keep)


def load_model(
    name: str, *, device: torch.device, dtype: torch.dtype | None = None, context_length: int | None = None
) -> LoadedModel:
    """From a folder or a hub id. dtype None is the checkpoint's own. Raises UnsupportedModel."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        module = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype or "auto", attn_implementation="eager", trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModel(f"cannot load the base model {name!r}: {error}") from error
    placed: PreTrainedModel = module.to(device)  # type: ignore[arg-type]
    return fit_model(placed, _tokenizer(name), name, context_length)


def _tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """None where the model has none: such a model is served by token ids alone."""
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None


def fit_model(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    name: str,
    context_length: int | None = None,
) -> LoadedModel:
    """Take over a module that runs with eager attention: swap its layers and prove that it computes the same."""
    from peftmux.runtime.model.verify import reference_logits, verify

    module.eval().requires_grad_(False)
    context_length = context_length or _context_length(module)
    pin_frequencies(module, context_length)
    expected = reference_logits(module)
    discovery = discover(module)
    anatomy = Anatomy.of(module)
    step = StepState()
    swapper = Swapper(module, discovery.token_linears, choose_dense(module.device, module.dtype), step)
    swapper.run()
    module.set_attn_implementation(IMPLEMENTATION)
    model = LoadedModel(module, tokenizer, name, discovery.layers, anatomy, swapper, step, context_length)
    verify(model, expected)
    return model


def _context_length(module: nn.Module) -> int:
    config: Any = module.config
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(length, int):
        raise UnsupportedModel(f"expected max_position_embeddings in the config of {type(module).__name__}, got none")
    return length
