"""The fields of AdapterHub's configs, read as its library reads them.

The library writes every field it knows, in its kind, and checks none when it reads: a null where a number belongs fails
later, and any other value stands for true. So a field that it knows must have a value of its kind here; absent, it has
the library's default. One that it does not know may be null, false or empty, as in PEFT's files, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import FieldTable, Honoured, NoEffect, is_layers, is_unset, show
from peftmux.adapters.errors import AdapterInvalid, Reason

HEAD_CONFIG, FUSION_CONFIG = "head_config.json", "adapter_fusion_config.json"
INTERFACE = "adapter_interface.json"

_RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""Activations, from before the library wrote its version."""


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_layer_list(value: Any) -> bool:
    return value is None or (isinstance(value, list) and is_layers(value))


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


OUTER: FieldTable = {
    "config": NoEffect("read by itself"),
    "name": NoEffect("read by itself"),
    "hidden_size": Honoured(None, lambda v: v is None or type(v) is int, "the width of the base"),
    "version": Honoured(None, _is_text, "a text"),
    **{name: NoEffect("the base is judged by its layers") for name in ("model_type", "model_class", "model_name")},
    "type": NoEffect("how older versions filed it"),
}
"""Around the config of an adapter, a head and a fusion."""

HEAD_OUTER: FieldTable = {
    **OUTER,
    **{name: NoEffect("of the base's own config") for name in ("label2id", "num_labels")},
}
FUSION_OUTER: FieldTable = {**OUTER, "adapter_names": NoEffect("read by itself")}


def in_todays_names(outer: dict[str, Any]) -> dict[str, Any]:
    """An adapter_config.json whose activation has the name that it has since files say their version."""
    own = outer.get("config")
    old = own.get("non_linearity") if isinstance(own, dict) else None
    if "version" in outer or not isinstance(old, str) or old not in _RENAMED:
        return outer
    return {**outer, "config": {**outer["config"], "non_linearity": _RENAMED[old]}}


def read_exact(config: Mapping[str, Any], table: FieldTable, file: str = "") -> dict[str, Any]:
    """The values of the table's honoured fields. `file` is for messages. Raises AdapterInvalid naming the field."""
    where = f" of {file}" if file else ""
    for name, value in config.items():
        rule = table.get(name)
        if isinstance(rule, Honoured):
            if not rule.accepts(value):
                raise AdapterInvalid(rule.reason, f"field {name}{where}: expected {rule.expected}, got {show(value)}")
        elif not isinstance(rule, NoEffect) and not is_unset(value):
            raise AdapterInvalid(
                Reason.UNSUPPORTED_FIELD,
                f"field {name}{where} is not served: expected null, false or empty, got {show(value)}",
            )
    return {name: config.get(name, rule.default) for name, rule in table.items() if isinstance(rule, Honoured)}


def read_outer(config: Mapping[str, Any], table: FieldTable, file: str, base: BaseModel) -> dict[str, Any]:
    """As `read_exact`; the width must be the base's."""
    fields = read_exact(config, table, file)
    if fields["hidden_size"] not in (None, base.hidden_size, base.state_width):
        raise AdapterInvalid(
            Reason.INVALID_FIELD,
            f"field hidden_size of {file}: expected {base.hidden_size}, the base's, got {fields['hidden_size']}",
        )
    return fields
