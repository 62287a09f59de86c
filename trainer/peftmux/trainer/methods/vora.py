"""VoRA (Wang et al., 2025, arXiv 2503.20680): a language model learns to see through low-rank pairs.

A patch embedding, trained from nothing, makes tokens of an image; unscaled pairs in the first layers do the rest, and
tokens of an image see each other both ways. The base stays as it is. The paper also distils a vision model into the
first layers while it trains on tens of millions of images; that is not done here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftmux.adapters.config import read_fields
from peftmux.adapters.errors import AdapterInvalid
from peftmux.adapters.images import ImageRule
from peftmux.adapters.methods.vora import FIELDS, VISION, adapted_sites, check_base, vision_part, vision_shapes
from peftmux.adapters.probing import evaluating
from peftmux.adapters.torch_base import TorchBase
from peftmux.kernels.vision import VisionPart, embed_patches
from peftmux.trainer.data import Example
from peftmux.trainer.data.images import ImageStore, RowImage, stacked
from peftmux.trainer.errors import OptionError
from peftmux.trainer.host.host import Change
from peftmux.trainer.host.inputs import causal_only, whole_mask
from peftmux.trainer.host.sites import ALL_LINEAR, path_of, select_sites, spelled_out
from peftmux.trainer.methods.base import AttachContext, AttachedAdapter, Method
from peftmux.trainer.methods.linear import expert_notes, uniform
from peftmux.trainer.methods.lora import LoraLinear, default_learning_rate

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class VoraConfig:
    """VoRA's options, in its own names."""

    r: int = field(default=64, metadata={"help": "rank; the paper's is 1024 at width 3584"})
    layers: int = field(default=24, metadata={"help": "how many of the base's layers have pairs, the first ones"})
    target_modules: str | list[str] = field(default=ALL_LINEAR, metadata={"help": "names of linear layers"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the pairs' input, in training only"})
    patch_size: int = field(default=14, metadata={"help": "pixels of a patch's side"})
    image_size: int = field(default=448, metadata={"help": "pixels of the side that every image is brought to"})
    vision_embedding_intermediate_size: int = field(default=1536, metadata={"help": "width of the patch embedding"})
    vision_attention_mask: Literal["bidirectional", "default"] = field(
        default="bidirectional", metadata={"help": "whether tokens of an image see each other both ways"}
    )
    image_mean: list[float] = field(
        default_factory=lambda: list(_CLIP_MEAN), metadata={"help": "three, taken from red, green and blue (0 to 1)"}
    )
    image_std: list[float] = field(
        default_factory=lambda: list(_CLIP_STD), metadata={"help": "three, by which the rest is divided"}
    )

    def __post_init__(self) -> None:
        for name in ("r", "layers", "patch_size", "vision_embedding_intermediate_size"):
            if getattr(self, name) < 1:
                raise OptionError(name.replace("_", "-"), f"expected 1 or more, got {getattr(self, name)}")
        if self.image_size < self.patch_size:
            raise OptionError("image-size", f"expected a patch's {self.patch_size} or more, got {self.image_size}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise OptionError("lora-dropout", f"expected 0 or more and below 1, got {self.lora_dropout}")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            got = f"{self.image_mean} and {self.image_std}"
            raise OptionError("image-std", f"expected three numbers each, above 0 in image-std, got {got}")

    @property
    def image_tokens(self) -> int:
        """Of every image."""
        return int((self.image_size // self.patch_size) ** 2)


class VisionEmbedding(nn.Module):
    """The tensors that make tokens of patches, named as in the file."""

    def __init__(self, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> None:
        super().__init__()
        self._fields = dict(fields)
        self._names = {name: name.replace(".", "_") for name in tensors}
        for name, tensor in tensors.items():
            self.register_parameter(self._names[name], nn.Parameter(tensor))

    def file_tensors(self) -> dict[str, Tensor]:
        return {name: self.get_parameter(own) for name, own in self._names.items()}

    def part(self) -> VisionPart:
        return vision_part(self._fields, self.file_tensors())


class ImageTokens(Change):
    """At the input embedding: ids from `vocabulary` on are patches of the store's images, `each` of every image."""

    def __init__(self, source: VisionEmbedding, store: ImageStore, vocabulary: int, each: int) -> None:
        super().__init__()
        self._source = (source,)  # no submodule: the adapter holds it
        self._store = store
        self._vocabulary, self._each = vocabulary, each

    def before(self, x: Tensor) -> Tensor:
        return x.clamp(max=self._vocabulary - 1)

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        here = self.sees(x)
        if not here.any():
            return y
        number = x[here] - self._vocabulary
        images, which = torch.unique(number // self._each, return_inverse=True)
        part = self._source[0].part()
        side = part.image_size // part.patch_size
        vectors = embed_patches(stacked(self._store, images), side, side, part)  # [images, each, D]
        y = y.clone()
        y[here] = vectors[which, number % self._each].to(y.dtype)
        return y

    def sees(self, ids: Tensor) -> Tensor:
        return ids >= self._vocabulary


class VoraAdapter(AttachedAdapter):
    """Pairs at linear layers, and images among the tokens of its rows."""

    takes_images = True

    def __init__(
        self, model: Any, pairs: Mapping[str, LoraLinear], vision: VisionEmbedding, fields: Mapping[str, object]
    ) -> None:
        part = vision.part()
        table = model.get_input_embeddings()
        self._store = ImageStore(ImageRule.of(part))
        self._first, self._each = table.num_embeddings, (part.image_size // part.patch_size) ** 2
        tokens = ImageTokens(vision, self._store, self._first, self._each)
        self._vision = vision
        if part.bidirectional:
            self.sees_both_ways = tokens.sees
        notes = expert_notes(model)
        super().__init__("vora", model, {**pairs, path_of(model, table): tokens}, fields, {VISION[:-1]: vision}, notes)

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return {name: t for name, t in self._named().items() if isinstance(t, nn.Parameter)}

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor.detach().float().cpu() for name, tensor in self._named().items()}

    def place(self, example: Example) -> Example:
        return example.with_inserted((placed.at, self._tokens(placed.image)) for placed in example.images)

    def _tokens(self, image: RowImage) -> range:
        first = self._first + self._store.add(image) * self._each
        return range(first, first + self._each)

    def _named(self) -> dict[str, Tensor]:
        pairs = {f"llm.{place}.{key}": t for place, c in self.changes.items() for key, t in c.file_tensors().items()}
        return {**pairs, **{VISION + name: tensor for name, tensor in self._vision.file_tensors().items()}}


def _attach(model: Any, config: VoraConfig, context: AttachContext) -> AttachedAdapter:
    if context.task != "generation":
        raise OptionError("task", "vora learns to write about images: a classifier is not asked about any")
    if context.examples and not any(example.images for example in context.examples):
        raise OptionError("data", "expected rows with images, a list of files or base64; found none (train lora)")
    named = select_sites(model, config.target_modules)
    fields: dict[str, Any] = {
        "peft_type": "VORA",
        "r": config.r,
        "layers": config.layers,
        "target_modules": spelled_out(model, list(named)),
        "lora_dropout": config.lora_dropout,
        "patch_size": config.patch_size,
        "image_size": config.image_size,
        "vision_embedding": "AIMv2Embedding",
        "vision_embedding_intermediate_size": config.vision_embedding_intermediate_size,
        "vision_attention_mask": config.vision_attention_mask,
        "rms_norm_eps": 1e-5,
        "image_mean": [float(value) for value in config.image_mean],
        "image_std": [float(value) for value in config.image_std],
    }
    base, read = TorchBase(model), read_fields(fields, FIELDS)
    try:
        check_base(read, base)
    except AdapterInvalid as error:
        raise OptionError("method", str(error)) from None
    if config.vision_attention_mask == "bidirectional":
        _check_masks(model)
    sites = adapted_sites(read, base)
    if not sites:
        raise OptionError("target-modules", f"expected linear layers in the first {config.layers} layers, found none")
    generator = torch.Generator().manual_seed(context.seed)
    pairs = {
        site: LoraLinear(model.get_submodule(site), config.r, 1.0, config.lora_dropout, generator) for site in sites
    }
    vision = VisionEmbedding(_initial(read, model.get_input_embeddings().weight, generator), read)
    return VoraAdapter(model, pairs, vision, fields)


def _initial(fields: Mapping[str, Any], table: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Linear maps uniform with the variance 1 / (3 in) as torch's; vectors of images get the spread of the tokens'."""
    shapes = vision_shapes(fields, table.shape[1])
    inside, width = 3 * fields["patch_size"] ** 2, fields["vision_embedding_intermediate_size"]
    spread = float(table.detach().float().std()) * (3 / width) ** 0.5

    def drawn(name: str, bound: float) -> Tensor:
        return uniform(shapes[name], bound, generator, table.device).detach()

    return {
        "patchifier.proj.weight": drawn("patchifier.proj.weight", inside**-0.5),
        "patchifier.proj.bias": torch.zeros(width, device=table.device),
        "patchifier.norm.weight": torch.ones(width, device=table.device),
        "pos_embed": drawn("pos_embed", 0.3**0.5),
        "out_proj.weight": drawn("out_proj.weight", spread),
    }


def _check_masks(model: Any) -> None:
    """Raises OptionError for a base that has no use for a mask that is complete already."""
    known = ("sdpa", "eager")
    used = model.config.get_text_config()._attn_implementation
    if used not in known:
        raise OptionError("attn-implementation", f"attention both ways needs {' or '.join(known)}, got {used}")
    ids = torch.arange(4, device=model.device).unsqueeze(0) % model.get_input_embeddings().num_embeddings
    order = causal_only(ids)
    refusal = OptionError("method", f"{type(model).__name__} takes no mask for attention both ways among image tokens")
    with evaluating(model):
        plain = model(input_ids=ids, use_cache=False).logits
        try:
            causal, both = (
                model(input_ids=ids, attention_mask=whole_mask(model, seen), use_cache=False).logits
                for seen in (order, torch.ones_like(order))
            )
        except (ValueError, RuntimeError) as error:  # one that counts positions by its mask
            raise refusal from error
    size = float(plain.float().std())
    if not (plain - causal).abs().max() < 0.05 * size or not (plain - both)[:, 0].abs().max() > 0:
        raise refusal


VORA = Method(
    name="vora",
    summary="images as tokens: a patch embedding, and pairs that learn to see",
    config_class=VoraConfig,
    attach=_attach,
    learning_rate=default_learning_rate,
    places_tokens=lambda config: True,
)
