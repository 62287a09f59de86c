"""What a method gives: a plan made from names and shapes alone, then the parts made from the values.

Two phases, so that an adapter for another base is refused before gigabytes of it are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.parts import Parts

__all__ = ["Method", "Parts", "Plan", "Shapes"]

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape, of everything in the files."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Every name and shape has been checked; `build` takes the same tensors as finite float32 on the CPU."""

    kind: str
    build: Callable[[Mapping[str, Tensor]], Parts]
    warnings: tuple[str, ...] = ()
    invocation: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Method:
    """One value of peft_type."""

    peft_type: str
    plan: Callable[[Mapping[str, Any], Shapes, BaseModel], Plan]
    """(config, shapes, base) -> Plan. Raises AdapterInvalid unless every tensor is used and every field honoured."""
    kinds: Callable[[BaseModel], tuple[str, ...]]
    """The kinds of adapter it can serve on a base, as METHOD on the command line."""
    needs_head: bool = False
    """Its files are refused unless a classification head stands in them."""
    generates: bool = False
    """Its files are refused where a classification head stands in them: nothing says what that would read."""
