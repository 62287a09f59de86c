"""VoRA: vision as LoRA. Images enter as patch embeddings; low-rank pairs in the first layers teach the model to see.

    y = W x + B A x        without a scale, for text and image tokens alike; image tokens see each other both ways

Source: Wang et al., 2025, arXiv 2503.20680. Files: `peft_type` VORA, the fields of VoRA's own config, `r` beside them,
and its tensors without the base's: `llm.<layer>.lora_A.weight` [r, in], `.lora_B.weight` [out, r],
`vision_embedding.patchifier.proj.weight` [C, 3, p, p] and `.bias`, `vision_embedding.patchifier.norm.weight` [C],
`vision_embedding.pos_embed` [1, P, C] and `vision_embedding.out_proj.weight` [D, C].
`target_modules` names layers by their endings and `layers` how many decoder layers have them, the first ones.
`image_mean` and `image_std` say how encoded images become numbers; sent as patches they are taken as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from torch import Tensor

from peftmux.adapters import targets
from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import (
    COMMON,
    FieldTable,
    Honoured,
    NoEffect,
    is_number,
    is_positive_int,
    is_texts,
    read_fields,
)
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.methods.ledger import Ledger
from peftmux.adapters.methods.lora_linear import claim_low_rank
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes
from peftmux.adapters.parts import IMAGES, LinearPart, VisionPart
from peftmux.adapters.patterns import PatternMatcher

VISION = "vision_embedding."
_COUNT = "a positive integer"
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _three(accepts: Any) -> Any:
    return lambda v: isinstance(v, list) and len(v) == 3 and all(is_number(x) and accepts(x) for x in v)


FIELDS: FieldTable = {
    **COMMON,
    "r": Honoured(1024, is_positive_int, _COUNT),
    "layers": Honoured(24, is_positive_int, _COUNT),
    "target_modules": Honoured(
        ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"], is_texts, "a list of names"
    ),
    "patch_size": Honoured(14, is_positive_int, _COUNT),
    "image_size": Honoured(448, is_positive_int, _COUNT),
    "vision_embedding": Honoured("AIMv2Embedding", lambda v: v in ("AIMv2", "AIMv2Embedding"), "AIMv2Embedding"),
    "vision_embedding_intermediate_size": Honoured(1536, is_positive_int, _COUNT),
    "vision_attention_mask": Honoured(
        "bidirectional", lambda v: v in ("bidirectional", "default"), "bidirectional or default"
    ),
    "rms_norm_eps": Honoured(1e-5, lambda v: is_number(v) and v > 0, "a positive number"),
    "image_mean": Honoured(list(_MEAN), _three(lambda v: True), "three numbers"),
    "image_std": Honoured(list(_STD), _three(lambda v: v > 0), "three positive numbers"),
    "aux_vision": NoEffect("training only"),
    "skip_aux_cls": NoEffect("training only"),
    "reuse_aux_vision_embedding_layers": NoEffect("initialisation"),
    "llm": NoEffect("the base is judged by its sites and shapes"),
    "lora_dropout": NoEffect("training only"),
}


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and every tensor's name and shape against the base."""
    fields = read_fields(config, FIELDS)
    check_base(fields, base)
    ledger = Ledger(shapes)
    pairs = {site: _claim_pair(site, fields["r"], ledger, base) for site in adapted_sites(fields, base)}
    names = _claim_vision(fields, ledger, base)
    ledger.close()

    def build(tensors: Mapping[str, Tensor]) -> Parts:
        linear = {site: LinearPart(tensors[a], tensors[b]) for site, (a, b) in pairs.items()}
        return Parts(linear, {IMAGES: (vision_part(fields, {short: tensors[name] for short, name in names.items()}),)})

    return Plan("vora", build)


def kinds(base: BaseModel) -> tuple[str, ...]:
    return ("vora",) if base.embedding and not base.windowed else ()


def check_base(fields: Mapping[str, Any], base: BaseModel) -> None:
    """Raises AdapterInvalid where images cannot be served as `fields` say."""
    if not base.embedding:
        raise AdapterInvalid(
            Reason.UNSUPPORTED_SITE,
            f"expected an input embedding that is a plain table for images, got that of {base.architecture}",
        )
    if base.windowed and fields["vision_attention_mask"] == "bidirectional":
        raise AdapterInvalid(
            Reason.UNSUPPORTED_SITE,
            f"attention both ways over image tokens is not served on a base with a sliding window: {base.architecture}",
        )


def adapted_sites(fields: Mapping[str, Any], base: BaseModel) -> list[str]:
    """The linear layers that have a pair. Raises AdapterInvalid where `target_modules` matches none."""
    matcher = PatternMatcher()
    wanted: dict[str, Any] = dict.fromkeys(targets.FIELDS) | {"target_modules": fields["target_modules"]}
    found = targets.target_sites(wanted, (), base, matcher)
    by_layer = {site: matcher.layer_index("layers", [], site) for site in found}
    return [site for site, layer in by_layer.items() if layer is not None and layer < fields["layers"]]


def _claim_pair(site: str, rank: int, ledger: Ledger, base: BaseModel) -> tuple[str, str]:
    a, b = f"llm.{site}.lora_A.weight", f"llm.{site}.lora_B.weight"
    linear = base.linear_sites[site]
    claim_low_rank(ledger, (a, linear.in_features), (b, linear.out_features), rank, site)
    return a, b


def vision_shapes(fields: Mapping[str, Any], hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Of the patch embedding's tensors, by their names after `VISION`."""
    width, size = fields["vision_embedding_intermediate_size"], fields["patch_size"]
    side = fields["image_size"] // size
    return {
        "patchifier.proj.weight": (width, 3, size, size),
        "patchifier.proj.bias": (width,),
        "patchifier.norm.weight": (width,),
        "pos_embed": (1, side * side, width),
        "out_proj.weight": (hidden_size, width),
    }


def vision_part(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> VisionPart:
    """fields: every one of `FIELDS`. tensors: by the names of `vision_shapes`; the part is differentiable in them."""
    positions = tensors["pos_embed"]
    assert isqrt(positions.shape[1]) ** 2 == positions.shape[1]
    return VisionPart(
        patch=tensors["patchifier.proj.weight"].flatten(1),
        patch_bias=tensors["patchifier.proj.bias"],
        norm=tensors["patchifier.norm.weight"],
        eps=fields["rms_norm_eps"],
        positions=positions[0],
        out=tensors["out_proj.weight"],
        patch_size=fields["patch_size"],
        image_size=fields["image_size"] // fields["patch_size"] * fields["patch_size"],
        mean=tuple(fields["image_mean"]),
        std=tuple(fields["image_std"]),
        bidirectional=fields["vision_attention_mask"] == "bidirectional",
    )


def _claim_vision(fields: Mapping[str, Any], ledger: Ledger, base: BaseModel) -> dict[str, str]:
    shapes = vision_shapes(fields, base.embedding_weight().shape[1])
    for name, shape in shapes.items():
        ledger.claim(VISION + name, shape)
    return {name: VISION + name for name in shapes}


METHOD = Method("VORA", plan, kinds)
