"""Options' types as their dataclasses hint them: unions, lists and dicts of plain values, and literal words."""

from __future__ import annotations

import types
from os import PathLike, fspath
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np


def kinds(hint: Any) -> tuple[Any, ...]:
    """The members of a union; of anything else itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def literals(hint: Any) -> list[Any]:
    """The words that are values of this type."""
    return [word for kind in kinds(hint) if get_origin(kind) is Literal for word in get_args(kind)]


def is_of(value: object, hint: Any) -> bool:
    """Whether `value` is of the type. A whole number is a float, too; true and false are no numbers."""
    return any(_is(value, kind) for kind in kinds(hint))


def _is(value: object, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return any(isinstance(value, type(word)) and value == word for word in inner)
    if origin is list:
        return isinstance(value, list | tuple) and all(is_of(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(is_of(k, inner[0]) and is_of(v, inner[1]) for k, v in value.items())
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, kind)


def plain_value(value: object) -> object:
    """Paths as text, numpy's numbers as Python's, also within lists and dicts."""
    if isinstance(value, dict):
        return {key: plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return fspath(value) if isinstance(value, PathLike) else value


def spelled(hint: Any) -> str:
    """For a message: `int or auto`."""
    return " or ".join(word for kind in kinds(hint) if kind is not type(None) for word in _words(kind))


def _words(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return [str(word) for word in get_args(kind)]
    return [kind.__name__ if get_origin(kind) is None else str(kind)]
