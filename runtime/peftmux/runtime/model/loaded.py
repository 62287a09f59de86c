"""A base model, fitted and ready to run steps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftmux.adapters.base import FeedForwardSite, KVShape, LinearSite, NormLayer, ParameterSite, ResidualBranch
from peftmux.adapters.branches import residual_branches
from peftmux.adapters.experts import parameter_names
from peftmux.adapters.parts import VIRTUAL_TOKENS, VirtualRows
from peftmux.adapters.stream import stream_layers
from peftmux.adapters.tables import table_scale
from peftmux.kernels.head import HeadSite
from peftmux.runtime.model.discover import AttentionLayer
from peftmux.runtime.model.first_pass import shows_its_hidden_state
from peftmux.runtime.model.sites import Site, SiteRef
from peftmux.runtime.model.states import StateTap
from peftmux.runtime.model.step import StepInputs, StepState
from peftmux.runtime.model.swaps import Swapper


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What a module is made of, read before its layers are swapped."""

    module_names: frozenset[str]
    parameter_names: tuple[str, ...]
    parameters: int
    embedding: str
    """Path of the input embedding; "" where it is more than a table."""
    head: str | None
    """Path of the output projection where it is a plain linear layer."""
    tied: bool
    """The head's weight is the input embedding's."""
    branches: Mapping[str, ResidualBranch]
    stream_layers: tuple[str, ...]
    shows_hidden_state: bool
    """The decoder's output is the last hidden state."""

    @classmethod
    def of(cls, module: PreTrainedModel) -> Anatomy:
        paths = {id(m): name for name, m in module.named_modules() if name}
        table, head = module.get_input_embeddings(), module.get_output_embeddings()
        plain_table, plain_head = table_scale(table) is not None, type(head) is nn.Linear
        return cls(
            module_names=frozenset(paths.values()),
            parameter_names=parameter_names(module),
            parameters=sum(p.numel() for p in module.parameters()),
            embedding=paths[id(table)] if plain_table else "",
            head=paths[id(head)] if plain_head else None,
            tied=plain_table and plain_head and head.weight is table.weight,
            branches=residual_branches(module),
            stream_layers=stream_layers(module),
            shows_hidden_state=shows_its_hidden_state(module),
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
        self.places: Mapping[tuple[type, str], Site] = swapped.places
        """By type of part and name of place."""
        self.feed_forwards: Mapping[str, FeedForwardSite] = swapped.feed_forwards
        self.branches: Mapping[str, ResidualBranch] = anatomy.branches
        self.norm_sites: Mapping[str, NormLayer] = swapped.norm_sites
        self.parameter_sites: Mapping[str, ParameterSite] = swapped.parameter_sites
        self.first_pass = swapped.first_pass
        self.vision = swapped.vision
        self.virtual = swapped.virtual
        self.ladders = swapped.ladders
        self.step = step
        self.context_length = context_length
        self.heads = HeadSite(module.device)
        self._tap = StateTap(module)
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
    def parameter_names(self) -> Sequence[str]:
        return self.anatomy.parameter_names

    @property
    def embedding(self) -> str:
        return self.anatomy.embedding

    @property
    def embedding_width(self) -> int:
        return self.embedding_weight().shape[1]

    @property
    def takes_virtual_tokens(self) -> bool:
        return (VirtualRows, VIRTUAL_TOKENS) in self.places

    @property
    def head(self) -> str | None:
        return self.anatomy.head if self.anatomy.head in self.sites else None

    @property
    def tied(self) -> bool:
        return self.anatomy.tied

    @property
    def shows_hidden_state(self) -> bool:
        return self.anatomy.shows_hidden_state

    @cached_property
    def windowed(self) -> bool:
        return any(layer.windowed for layer in self.layers)

    @cached_property
    def hidden_size(self) -> int:
        return int(self.module.config.get_text_config().hidden_size)

    @cached_property
    def vocab_size(self) -> int:
        return int(self.module.config.get_text_config().vocab_size)

    @property
    def state_width(self) -> int:
        return self._tap.width

    @property
    def stream_layers(self) -> Sequence[str]:
        return self.anatomy.stream_layers if self.state_width else ()

    @cached_property
    def linear_sites(self) -> Mapping[str, LinearSite]:
        return {name: ref.site for name, ref in self.sites.items()}

    @cached_property
    def kv_shapes(self) -> Sequence[KVShape]:
        return tuple(layer.kv for layer in self.layers)

    @property
    def flops_per_key(self) -> int:
        """What one more token of context costs each token, over all layers: a product with a key and with a value."""
        return sum(2 * layer.query_heads * (layer.kv.key_dim + layer.kv.value_dim) for layer in self.layers)

    @cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a generation, of the generation config or the model's config."""
        generation = getattr(self.module, "generation_config", None)
        eos = getattr(generation, "eos_token_id", None)
        if eos is None:
            eos = getattr(self.module.config.get_text_config(), "eos_token_id", None)
        ids = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
        return tuple(i for i in ids if 0 <= i < self.vocab_size)

    @cached_property
    def pad_token_id(self) -> int | None:
        """Of the model's config, which transformers' classifiers go by."""
        pad = getattr(self.module.config.get_text_config(), "pad_token_id", None)
        return pad if isinstance(pad, int) else None

    def weight(self, site: str) -> Tensor:
        return self.sites[site].weight()

    def bias(self, site: str) -> Tensor | None:
        return self.sites[site].bias()

    def embedding_weight(self) -> Tensor:
        weight = self.module.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def compute(self, inputs: StepInputs, embeddings: Tensor) -> None:
        """Keys and values of tokens that are vectors [T, D] instead of `inputs.ids`, into the cache."""
        self.step.set(inputs)
        self._tap.wanted = False
        keep = {"logits_to_keep": inputs.keep} if self._keeps_logits else {}
        self.module(
            inputs_embeds=embeddings.to(self.device, self.dtype).unsqueeze(0),
            position_ids=inputs.positions,
            use_cache=False,
            **keep,
        )

    def forward(self, inputs: StepInputs) -> Tensor:
        """Logits [S, V] of the kept tokens, in the model's dtype; writes the step's keys and values to the cache."""
        self.step.set(inputs)
        self._tap.wanted = inputs.states is not None
        keep = {"logits_to_keep": inputs.keep} if self._keeps_logits else {}
        logits: Tensor = self.module(
            input_ids=inputs.ids, position_ids=inputs.positions, use_cache=False, **keep
        ).logits[0]
        return logits if self._keeps_logits else logits.index_select(0, inputs.keep)

    def states(self, inputs: StepInputs) -> Tensor:
        """[N, state_width]: the final hidden states of `inputs.states`, of the forward that has just run."""
        assert inputs.states is not None, "the step reads no states"
        return self._tap.take(inputs.states)

    def hidden(self, inputs: StepInputs) -> Tensor:
        """The last hidden state [T, D] of all tokens; writes keys and values as `forward` does."""
        self.step.set(inputs)
        decoder = self.module.get_decoder()
        out: Tensor = decoder(input_ids=inputs.ids, position_ids=inputs.positions, use_cache=False).last_hidden_state[0]
        return out
