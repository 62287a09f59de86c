"""Walks over what parts are made of: dataclasses of tensors, plain values, tuples, and further dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from torch import Tensor

P = TypeVar("P")


def mapped(part: P, change: Callable[[Tensor], Tensor]) -> P:
    """The same part with every tensor changed."""
    return cast(P, _mapped(part, change))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_mapped(item, change) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: _mapped(getattr(value, f.name), change) for f in dataclasses.fields(value)})
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor inside."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))
