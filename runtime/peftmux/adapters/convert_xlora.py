"""PEFT's X-LoRA folders to the one complete folder that is served (see `methods/xlora`), offline."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from peftmux.adapters.config import is_unset, read_fields
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.files import CONFIG_FILE, TENSOR_FILE, parse_config
from peftmux.adapters.methods import lora
from peftmux.adapters.methods.ledger import PREFIX
from peftmux.adapters.methods.xlora import CLASSIFIER, FIELDS, classifier_layers
from peftmux.adapters.patterns import PatternMatcher

FULL_CLASSIFIER = "classifier_full.safetensors"
_PAIR = re.compile(re.escape(PREFIX) + r"(?P<site>.+)\.lora_(?P<matrix>[AB])\.weight")
_PLAIN = ("use_dora", "lora_bias", "alora_invocation_tokens", "modules_to_save", "trainable_token_indices")


def gather_xlora(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """-> (config, tensors) of the complete folder. Raises AdapterInvalid where a piece is missing or torn.

    The classifier is `classifier_full.safetensors` where that is there (`layers.N.weight`), else PEFT's own tensors.
    Expert NAME of the config's `adapters` is the folder that it gives: as it stands, or beside this one.
    """
    adapters = read_fields(config, FIELDS)["adapters"] or {}
    tensors = _classifier(folder, config)
    for number, path in enumerate(adapters.values()):
        for site, matrix, value in _expert(_find(folder, str(path))):
            tensors[f"{PREFIX}{site}.experts.{number}.lora_{matrix}.weight"] = value
    return {**config, "adapters": {str(i): str(i) for i in range(len(adapters))}}, tensors


def _classifier(folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    full = folder / FULL_CLASSIFIER
    stored = _load(full) if full.is_file() else _load(folder / TENSOR_FILE)
    layers = {name.removeprefix(CLASSIFIER).removeprefix("layers."): value for name, value in stored.items()}
    wanted = [f"{n}.{kind}" for n in classifier_layers(config) for kind in ("weight", "bias")]
    for name in wanted:
        if name not in layers:
            raise AdapterInvalid(
                Reason.MISSING_TENSOR,
                f"expected the classifier's layers.{name}, which is missing: PEFT 0.21 loses it when it saves; put the "
                f"whole classifier into {FULL_CLASSIFIER}",
            )
    return {CLASSIFIER + name: layers[name] for name in wanted}


def _find(folder: Path, path: str) -> Path:
    for place in (Path(path), folder / path, folder.parent / Path(path).name):
        if (place / CONFIG_FILE).is_file() and (place / TENSOR_FILE).is_file():
            return place
    raise AdapterInvalid(
        Reason.MISSING_FILE,
        f"field adapters: expected the LoRA folder {path!r}, as it stands or beside {folder.name}, found none",
    )


def _expert(folder: Path) -> Iterator[tuple[str, str, Tensor]]:
    """(site, "A" or "B", tensor with the LoRA's scale in B) of one plain LoRA."""
    fields = read_fields(parse_config((folder / CONFIG_FILE).read_bytes()), lora.FIELDS)
    for name in (*_PLAIN, "target_parameters"):
        if not is_unset(fields.get(name)):
            raise AdapterInvalid(Reason.UNSUPPORTED_FIELD, f"{folder.name}: field {name} is not served in an expert")
    matcher = PatternMatcher()
    for name, value in sorted(_load(folder / TENSOR_FILE).items()):
        match = _PAIR.fullmatch(name)
        if match is None:
            raise AdapterInvalid(
                Reason.UNUSED_TENSOR,
                f"{folder.name}: expected a plain LoRA's tensors, got {name}: an expert has no other",
            )
        scale = _scale(fields, match["site"], matcher) if match["matrix"] == "B" else 1.0
        yield match["site"], match["matrix"], value.float() * scale


def _scale(fields: Mapping[str, Any], site: str, matcher: PatternMatcher) -> float:
    rank_key = matcher.first_key("rank_pattern", fields["rank_pattern"], site)
    alpha_key = matcher.first_key("alpha_pattern", fields["alpha_pattern"], site)
    rank = fields["r"] if rank_key is None else fields["rank_pattern"][rank_key]
    alpha = fields["lora_alpha"] if alpha_key is None else fields["alpha_pattern"][alpha_key]
    return lora.lora_scaling(alpha, rank, fields["use_rslora"])


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, ValueError) as error:
        raise AdapterInvalid(Reason.MALFORMED_TENSORS, f"{path.name}: {error}") from error
