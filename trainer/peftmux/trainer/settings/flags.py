"""Dataclass fields as command-line flags."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from peftmux.trainer.settings.value_types import kinds, literals


def add_fields(group: argparse._ArgumentGroup, config_class: type[Any]) -> None:
    """One flag per field, `--like-this` (and `--like_this`); help comes from the field's metadata."""
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if not field.init:
            continue
        flags = list(dict.fromkeys([f"--{field.name.replace('_', '-')}", f"--{field.name}"]))
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        help_text = field.metadata.get("help", "")
        if not required and field.default not in (None, dataclasses.MISSING):
            help_text += f" (default: {field.default})"
        kwargs = _argument(hints[field.name])
        group.add_argument(
            *flags,
            dest=field.name,
            required=required,
            default=argparse.SUPPRESS,
            help=help_text.replace("%", "%%"),
            **kwargs,
        )


def _argument(hint: Any) -> dict[str, Any]:
    """argparse's way to read one value of this type."""
    options = [t for t in kinds(hint) if t is not type(None)]
    lists = [t for t in options if get_origin(t) is list]
    if lists:
        convert = get_args(lists[0])[0]
        return {"nargs": "+", "type": convert, "action": _ListOrPattern if str in options else "store"}
    kind = options[0]
    if len(options) > 1 and (words := literals(hint)):
        return {"type": _or_word(kind, words)}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is dict:
        return {"type": _json_object(*get_args(kind)), "metavar": "JSON"}
    return {"type": kind}


def _or_word(kind: type, words: Sequence[str]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return text if text in words else kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else kind.__name__
            raise argparse.ArgumentTypeError(f"expected {wanted} or {' or '.join(words)}, got {text!r}") from None

    return parse


class _ListOrPattern(argparse.Action):
    """Several names are a list; one value with the signs of a regular expression, or all-linear, is a string."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        alone = values[0]
        pattern = len(values) == 1 and (alone == "all-linear" or any(c in alone for c in r"*+?()[]{}|\^$"))
        setattr(namespace, self.dest, alone if pattern else values)


def _json_object(key: type, value: type) -> Callable[[str], dict[Any, Any]]:
    def parse(text: str) -> dict[Any, Any]:
        try:
            return {key(k): value(v) for k, v in json.loads(text).items()}
        except (ValueError, AttributeError, TypeError):
            raise argparse.ArgumentTypeError(
                f"expected a JSON object of {key.__name__} to {value.__name__}, got {text!r}"
            ) from None

    return parse
