"""Prefix tuning (Li and Liang, 2021, arXiv 2101.00190): trained keys and values before the first token, in every layer.

The tensor is the keys and values themselves (no encoder), which start as those of real text run through the model:
trained from random values, prefixes learn far worse.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftmux.adapters.base import KVShape
from peftmux.adapters.errors import AdapterInvalid
from peftmux.adapters.methods.prefix import TENSOR, provisioned_shape, split_prefix
from peftmux.adapters.torch_base import TorchBase
from peftmux.trainer.errors import OptionError
from peftmux.trainer.methods.base import AttachContext, AttachedAdapter, Method
from peftmux.trainer.methods.prefix_start import initial_prefix

_WIDEST = 512
"""The paper's width of the perceptron, for bases of 1024 and more."""


@dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """Prefix tuning's options."""

    num_virtual_tokens: int | None = field(default=20, metadata={"help": "length of the prefix"})
    prefix_init: Literal["text", "random"] = field(
        default="text",
        metadata={"help": "start from the keys and values of the training data's first tokens, or random"},
    )
    prefix_init_text: str | None = field(default=None, metadata={"help": "start from this text instead of the data"})
    prefix_init_from: str | None = field(
        default=None,
        metadata={"help": "start from the prefix in this folder, trained on other tasks"},
    )
    prefix_projection: bool = field(
        default=False,
        metadata={
            "help": "compute it by a perceptron while training, as the paper does; the default learning rate is then "
            "3e-3, for a width of more than 256 less in proportion"
        },
    )
    encoder_hidden_size: int | None = field(
        default=None, metadata={"help": "its width; default: the base's, 512 at most"}
    )

    def __post_init__(self) -> None:
        for name in ("num_virtual_tokens", "encoder_hidden_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(name.replace("_", "-"), f"expected 1 or more, got {value}")
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise OptionError("encoder-hidden-size", "is the projection's: give --prefix-projection")
        starts = (self.prefix_init_text is not None, self.prefix_init_from is not None, self.prefix_init == "random")
        if sum(starts) > 1:
            raise OptionError("prefix-init", "expected one start: a text, a folder or random values")

    @staticmethod
    def default_length(task: str) -> int:
        return 100 if task == "token" else 20


@dataclass(frozen=True, kw_only=True)
class PTuningV2Config(PrefixConfig):
    """P-Tuning v2's: the length goes by the task."""

    num_virtual_tokens: int | None = field(
        default=None,
        metadata={"help": "length of the prefix; default: 20, and 100 where every token is labelled (the paper's)"},
    )


class Prefix(nn.Module):
    """Trained keys and values. `embeddings` is PEFT's tensor, as `peftmux.adapters.methods.prefix` describes it."""

    def __init__(self, embeddings: Tensor, shapes: Sequence[KVShape], dtype: torch.dtype) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(embeddings.detach().float().clone())
        self._shapes = tuple(shapes)
        self._widest = provisioned_shape(shapes)
        self._dtype = dtype

    @property
    def length(self) -> int:
        return self.embeddings.shape[0]

    def stored(self) -> Tensor:
        """What the file holds."""
        return self.embeddings

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        prefix = split_prefix(self.stored().to(self._dtype), self._shapes, self._widest)
        return list(zip(prefix.keys, prefix.values, strict=True))

    def fields(self) -> dict[str, object]:
        """Of adapter_config.json."""
        heads, head_dim = self._widest.kv_heads, self._widest.key_dim
        return {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": self.length,
            "num_layers": len(self._shapes),
            "num_attention_heads": heads,
            "token_dim": heads * head_dim,
            "encoder_hidden_size": heads * head_dim,
            "num_transformer_submodules": 1,
            "prefix_projection": False,
        }


class ProjectedPrefix(Prefix):
    """A perceptron's answer to trained vectors, added to the keys and values it starts from.

    The paper has no such sum. The last layer starts at zero, so that the prefix starts as real text's, too.
    """

    start: Tensor

    def __init__(
        self, embeddings: Tensor, shapes: Sequence[KVShape], dtype: torch.dtype, hidden: int, seed: int
    ) -> None:
        super().__init__(embeddings, shapes, dtype)
        count, width = embeddings.shape
        del self.embeddings
        self.register_buffer("start", embeddings.detach().float().clone())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.table = nn.Parameter(torch.randn(count, hidden))
            self.first = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, width)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.to(embeddings.device)

    @property
    def length(self) -> int:
        return self.start.shape[0]

    def stored(self) -> Tensor:
        changed: Tensor = self.last(self.first(self.table).tanh())
        return self.start + changed


class PrefixAdapter(AttachedAdapter):
    """Nothing at the base's places: all of it comes before the first token."""

    prefix: Prefix

    def __init__(self, model: Any, prefix: Prefix, layers: int) -> None:
        self.prefix = prefix
        self._layers = layers
        self._checkpointed: list[nn.Module] = []
        super().__init__("prefix", model, {}, prefix.fields(), {"prefix": prefix})

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        named = dict(self.prefix.named_parameters())
        return {TENSOR if name == "embeddings" else f"prefix.{name}": p for name, p in named.items()}

    def tensors(self) -> dict[str, Tensor]:
        return {TENSOR: self.prefix.stored().detach().cpu()}

    def sites(self) -> Mapping[str, int]:
        if isinstance(self.prefix, ProjectedPrefix):
            return {"prefix projection": sum(p.numel() for p in self.prefix.parameters())}
        return {f"attention layer {i}": self.prefix.embeddings.numel() // self._layers for i in range(self._layers)}

    def checkpoint_activations(self) -> bool:
        """transformers' own way takes the cache, and with it the prefix, away from every layer; this one does not."""
        for layer in _decoder_layers(self._model):
            layer.forward = functools.partial(_recomputed, type(layer).forward, layer)
            self._checkpointed.append(layer)
        return True

    def detach(self) -> None:
        super().detach()
        for layer in self._checkpointed:
            del layer.forward


def _recomputed(forward: Any, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not (layer.training and torch.is_grad_enabled()):
        return forward(layer, *args, **kwargs)
    return checkpoint(forward, layer, *args, use_reentrant=False, **kwargs)


def _decoder_layers(model: Any) -> list[nn.Module]:
    """The modules of the longest list of layers: the decoder's blocks."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    blocks = [m for m in lists if len(m) == model.config.get_text_config().num_hidden_layers]
    if not blocks:
        raise OptionError("gradient-checkpointing", "prefix tuning finds no list of decoder layers in this base")
    return list(blocks[0])


def _attach(model: Any, config: PrefixConfig, context: AttachContext) -> AttachedAdapter:
    shapes = TorchBase(model).kv_shapes
    try:
        provisioned_shape(shapes)
    except AdapterInvalid as error:
        raise OptionError("method", str(error)) from None
    layers = model.config.get_text_config().num_hidden_layers
    if len(shapes) != layers:
        message = f"prefix does not fit this base: {len(shapes)} of its {layers} layers keep keys and values"
        raise OptionError("method", message)
    embeddings = initial_prefix(model, config, context, shapes)
    adapter = PrefixAdapter(model, Prefix(embeddings, shapes, model.dtype), len(shapes))
    try:
        _check_every_layer_reads_it(model, adapter, len(shapes))
    except BaseException:
        adapter.detach()
        raise
    if not config.prefix_projection:
        return adapter
    adapter.detach()
    hidden = _perceptron_width(config, model.config.get_text_config().hidden_size)
    projected = ProjectedPrefix(embeddings, shapes, model.dtype, hidden, context.seed)
    return PrefixAdapter(model, projected, len(shapes))


def _check_every_layer_reads_it(model: Any, adapter: PrefixAdapter, layers: int) -> None:
    """Raises OptionError where a layer ignores its past, as recurrent ones do: the prefix would not act there."""
    with torch.enable_grad():
        logits = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device)).logits
        (grad,) = torch.autograd.grad(logits.float().square().sum(), adapter.prefix.embeddings)
    per_layer = grad.view(adapter.prefix.length, layers, -1).abs().amax(dim=(0, 2))
    ignoring = [i for i, size in enumerate(per_layer.tolist()) if size == 0.0]
    if ignoring:
        raise OptionError("method", f"prefix does not fit this base: layers {ignoring} do not attend to past keys")


def _perceptron_width(config: PrefixConfig, hidden_size: int) -> int:
    return config.encoder_hidden_size or min(hidden_size, _WIDEST)


def _rate_factor(config: PrefixConfig, hidden_size: int) -> float:
    """A step of Adam's moves every weight of the perceptron by the rate, and what it computes by a sum over its width.

    At the rate of keys and values themselves it leaves the text that it starts from at once, and may not come back.
    """
    return 0.1 * min(1.0, 256 / _perceptron_width(config, hidden_size)) if config.prefix_projection else 1.0


PREFIX = Method(
    name="prefix",
    summary="trained keys and values before the first token, in every layer",
    config_class=PrefixConfig,
    attach=_attach,
    learning_rate=lambda hidden_size: 3e-2,  # keys and values are near 1 in size whatever the width
    rate_factor=_rate_factor,
)

P_TUNING_V2 = Method(
    name="p-tuning-v2",
    summary="prefixes as P-Tuning v2 has them: for classifiers, of a length that goes by the task",
    config_class=PTuningV2Config,
    attach=_attach,
    learning_rate=PREFIX.learning_rate,
    rate_factor=_rate_factor,
)
