"""Classification heads in adapter files, whatever the method beside them.

PEFT saves the head of a SEQ_CLS or TOKEN_CLS model whole: transformers' `score` or `classifier`, under
`base_model.model.` or, for prompt methods, directly under `base_model.`. The rest of the files is the method's, as on
a model without output projection. PEFT saves no label names: `id2label` or `label2id` in the config gives them,
LABEL_0, LABEL_1, ... stand for them otherwise. AdapterHub keeps its head in `head_config.json` with its own tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import FieldTable, Honoured, NoEffect, is_unset, show
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.hub_fields import HEAD_CONFIG, is_flag, read_exact
from peftmux.adapters.methods.ledger import Ledger
from peftmux.adapters.methods.registry import Shapes
from peftmux.kernels.head import ACTIVATIONS, Head, HeadLayer

_KINDS: dict[str, Literal["sequence", "token"]] = {"SEQ_CLS": "sequence", "TOKEN_CLS": "token"}
_HUB_KINDS: dict[str, Literal["sequence", "token"]] = {"classification": "sequence", "tagging": "token"}
_MODULES = ("score", "classifier")
_TENSOR = re.compile(r"(base_model\.(?:model\.)?(?:score|classifier))\.(?:weight|bias)")
_LABEL_FIELDS = ("id2label", "label2id")
_SAVED = "modules_to_save"
_MAX_LABEL = 1024
"""Characters of one name: every answer carries all names."""


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """A head whose names and shapes have been checked."""

    kind: Literal["sequence", "token"]
    layers: tuple[tuple[str, str | None], ...]
    """(weight, bias) tensor names in order; the last is the output."""
    labels: tuple[str, ...]
    activation: str = ""
    copies: tuple[str, ...] = ()
    """Tensors that repeat the output's bias."""
    idle: tuple[str, ...] = ()
    """Tensors of a head that this one stands in the place of."""

    @property
    def tensors(self) -> frozenset[str]:
        own = {name for layer in self.layers for name in layer if name is not None}
        return frozenset(own.union(self.copies, self.idle))

    def build(self, tensors: Mapping[str, Tensor]) -> Head:
        for copy in self.copies:
            bias = self.layers[-1][1]
            assert bias is not None, "only a bias has copies"
            if not torch.equal(tensors[copy], tensors[bias]):
                raise AdapterInvalid(Reason.UNUSED_TENSOR, f"expected tensor {copy} to equal {bias}, got other values")
        *hidden, output = [HeadLayer(tensors[w], None if b is None else tensors[b]) for w, b in self.layers]
        return Head(self.kind, output, self.labels, tuple(hidden), self.activation)


@dataclass(frozen=True, slots=True)
class Split:
    """A head, and what is left for the method: as an adapter of a causal model whose head it does not touch."""

    head: HeadPlan
    config: Mapping[str, Any]
    shapes: Shapes
    base: BaseModel


def split_head(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Split | None:
    """Claim the head of a SEQ_CLS or TOKEN_CLS adapter. None for any other task. Raises AdapterInvalid."""
    task = config.get("task_type")
    kind = _KINDS.get(task) if isinstance(task, str) else None
    if kind is None:
        _refuse_untold(task, shapes, base)
        return None
    _check_base(base)
    ledger = Ledger(shapes)
    module = _head_module(shapes, str(task))
    count, _ = ledger.claim(f"{module}.weight", (None, base.state_width))
    bias = f"{module}.bias" if kind == "token" or f"{module}.bias" in ledger else None
    copies: list[str] = []
    idle: list[str] = []
    if bias is not None:  # transformers gives every token head one
        ledger.claim(bias, (count,))
        copies = _claimed(ledger, f"{module}.modules_to_save.bias", count)  # as bias="all" saves them
        idle = _claimed(ledger, f"{module}.original_module.bias", count)
    layers = ((f"{module}.weight", bias),)
    plan = HeadPlan(kind, layers, _labels(config, count), copies=tuple(copies), idle=tuple(idle))
    rest = {name: shape for name, shape in shapes.items() if name not in plan.tensors}
    return Split(plan, _method_config(config), rest, cast(BaseModel, Backbone(base)))


def _claimed(ledger: Ledger, name: str, count: int) -> list[str]:
    """The tensor, where it is there."""
    if name not in ledger:
        return []
    ledger.claim(name, (count,))
    return [name]


def plan_hub_head(config: Mapping[str, Any], name: str, shapes: Shapes, base: BaseModel) -> HeadPlan:
    """A head as AdapterHub saves it: `config` is the "config" object of head_config.json, `name` the head's name.

    shapes: of model_head.safetensors; every tensor of it must be the head's. Raises AdapterInvalid.
    """
    _check_base(base)
    fields = read_exact(config, _HUB_FIELDS, HEAD_CONFIG)
    kind, count, depth = (_given(fields, name) for name in ("head_type", "num_labels", "layers"))
    activation = (fields["activation_function"] or "").lower() if depth > 1 else ""
    if activation not in ACTIVATIONS:
        _refuse_hub("activation_function", f"one of {', '.join(filter(None, ACTIVATIONS))}", activation)
    if fields["use_pooler"]:
        _refuse_hub("use_pooler", "false (a decoder has no pooler)", True)
    ledger, width = Ledger(shapes), base.state_width
    layers: list[tuple[str, str | None]] = []
    position = 1  # every layer stands after a dropout, and a hidden one before its activation
    for index in range(depth):
        last = index == depth - 1
        weight, bias = f"heads.{name}.{position}.weight", f"heads.{name}.{position}.bias"
        ledger.claim(weight, (count if last else width, width))
        has_bias = not last or fields["bias"]
        if has_bias:
            ledger.claim(bias, (count if last else width,))
        layers.append((weight, bias if has_bias else None))
        position += 3 if activation else 2
    ledger.close()
    return HeadPlan(_HUB_KINDS[kind], tuple(layers), _labels({"label2id": fields["label2id"]}, count), activation)


class Backbone:
    """A base as a method sees it that serves a classification model: everything but the output projection."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self.head = None
        self.tied = False
        self.linear_sites = {name: site for name, site in base.linear_sites.items() if name != base.head}
        self.module_names = base.module_names - {base.head or ""}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def _check_base(base: BaseModel) -> None:
    if not base.state_width:
        raise AdapterInvalid(
            Reason.UNSUPPORTED_TASK,
            f"expected a base whose final hidden states can be read apart from its logits, got {base.architecture}",
        )


def _head_module(shapes: Shapes, task: str) -> str:
    """The path before the head's tensor names. One head: PEFT saves whichever of its two names the model has."""
    found = sorted({match[1] for name in shapes if (match := _TENSOR.fullmatch(name))})
    if len(found) == 1:
        return found[0]
    if not found:
        raise AdapterInvalid(
            Reason.MISSING_TENSOR,
            f"expected tensor base_model.model.score.weight or classifier.weight, the head of a {task} adapter, "
            "which is missing",
        )
    raise AdapterInvalid(Reason.UNUSED_TENSOR, f"expected one head, got {' and '.join(found)}")


def _refuse_untold(task: Any, shapes: Shapes, base: BaseModel) -> None:
    """A head's tensors do not say whether it reads sequences or tokens."""
    name = next((name for name in sorted(shapes) if _TENSOR.fullmatch(name)), None)
    if name is not None and task in (None, "CAUSAL_LM") and base.module_names.isdisjoint(_MODULES):
        raise AdapterInvalid(
            Reason.UNSUPPORTED_TASK,
            f"field task_type: expected SEQ_CLS or TOKEN_CLS beside tensor {name}, got {show(task)}",
        )


def _method_config(config: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in config.items() if name not in _LABEL_FIELDS}
    rest["task_type"] = "CAUSAL_LM"
    saved = rest.get(_SAVED)
    if isinstance(saved, list):
        rest[_SAVED] = [name for name in saved if name not in _MODULES]
    return rest


def _labels(config: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """`count` names by index. Both fields may be given where they agree."""
    named = [labels for field in _LABEL_FIELDS if (labels := _named(config, field, count))]
    if len(named) == 2 and named[0] != named[1]:
        raise AdapterInvalid(Reason.INVALID_FIELD, "field label2id: expected the names of id2label, got others")
    return named[0] if named else tuple(f"LABEL_{i}" for i in range(count))


def _named(config: Mapping[str, Any], field: str, count: int) -> tuple[str, ...] | None:
    value = config.get(field)
    if is_unset(value):
        return None
    pairs = list(value.items()) if isinstance(value, dict) else []
    by_id = {str(i): name for i, name in (pairs if field == "id2label" else [(v, k) for k, v in pairs])}
    names = [by_id.get(str(i)) for i in range(count)]
    fits = len(pairs) == len(by_id) == count and len(set(map(str, names))) == count
    if not fits or not all(isinstance(name, str) and 0 < len(name) <= _MAX_LABEL for name in names):
        raise AdapterInvalid(
            Reason.INVALID_FIELD,
            f"field {field}: expected a distinct name for each of the head's {count} labels, got {show(value)}",
        )
    return tuple(map(str, names))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 20


_HUB_FIELDS: FieldTable = {
    "head_type": Honoured(
        None,
        lambda v: isinstance(v, str) and v in _HUB_KINDS,
        f"one of {', '.join(_HUB_KINDS)}",
        Reason.UNSUPPORTED_FIELD,
    ),
    "num_labels": Honoured(None, _is_count, "a positive integer", Reason.UNSUPPORTED_FIELD),
    "layers": Honoured(None, _is_count, "a positive integer", Reason.UNSUPPORTED_FIELD),
    "activation_function": Honoured(None, lambda v: v is None or isinstance(v, str), "a name or null"),
    "use_pooler": Honoured(False, is_flag, "true or false"),
    "bias": Honoured(True, is_flag, "true or false"),
    "label2id": Honoured(None, lambda v: v is None or isinstance(v, dict), "an object or null"),
    "dropout_prob": NoEffect("training only"),
}


def _given(fields: Mapping[str, Any], name: str) -> Any:
    if fields[name] is None:
        _refuse_hub(name, _HUB_FIELDS[name].expected, None)  # type: ignore[union-attr]
    return fields[name]


def _refuse_hub(field: str, expected: str, got: Any) -> None:
    raise AdapterInvalid(
        Reason.UNSUPPORTED_FIELD, f"field {field} of head_config.json: expected {expected}, got {show(got)}"
    )
