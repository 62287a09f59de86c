"""What becomes of each field of an adapter's config.

An absent field takes PEFT's default. One that is null, false, empty or PEFT's default is accepted whatever its name.
Any other value is honoured, has no effect on what the files compute, or is refused by name: never quietly dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peftmux.adapters.errors import AdapterInvalid, Reason

MAX_PATTERNS = 4096
"""In one field; one for each linear layer of an 80-layer model is 560."""


@dataclass(frozen=True, slots=True)
class Honoured:
    """Read by the method. `accepts` judges a value that is not null, false or empty."""

    default: Any
    accepts: Callable[[Any], bool]
    expected: str
    reason: Reason = Reason.INVALID_FIELD


@dataclass(frozen=True, slots=True)
class NoEffect:
    """Any value is accepted, because what the files compute does not depend on it."""

    why: str


@dataclass(frozen=True, slots=True)
class OnlyDefault:
    """Refused unless it has PEFT's default, which is not null, false or empty here."""

    default: Any


FieldTable = Mapping[str, Honoured | NoEffect | OnlyDefault]

COMMON: FieldTable = {
    "peft_type": NoEffect("chose the method"),
    "task_type": Honoured(None, lambda v: v == "CAUSAL_LM", "CAUSAL_LM, SEQ_CLS or TOKEN_CLS", Reason.UNSUPPORTED_TASK),
    "auto_mapping": NoEffect("says which class to build when none is given"),
    "base_model_name_or_path": NoEffect("the base is judged by its sites and shapes"),
    "revision": NoEffect("of the base model's repository"),
    "inference_mode": NoEffect("says whether to train"),
    "peft_version": NoEffect("who wrote the files"),
    "runtime_config": NoEffect("PEFT ignores it on load"),
}


def read_fields(config: Mapping[str, Any], table: FieldTable) -> dict[str, Any]:
    """The values of the table's honoured fields, defaults filled in. Raises AdapterInvalid naming the field."""
    for name, value in sorted(config.items(), key=lambda item: item[0] != "task_type"):
        _check_field(name, value, table.get(name))
    return {
        name: rule.default if is_unset(config.get(name)) else config[name]
        for name, rule in table.items()
        if isinstance(rule, Honoured)
    }


def is_unset(value: Any) -> bool:
    """Null, false or empty: accepted for every field, and the same as leaving it out. The number 0 is a value."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _check_field(name: str, value: Any, rule: Honoured | NoEffect | OnlyDefault | None) -> None:
    if is_unset(value) or isinstance(rule, NoEffect):
        return
    if isinstance(rule, Honoured):
        if not rule.accepts(value):
            raise AdapterInvalid(rule.reason, f"field {name}: expected {rule.expected}, got {show(value)}")
        return
    default = rule.default if rule else None
    if rule is None or value != default:
        expected = "null, false or empty" if rule is None else f"{default!r}"
        raise AdapterInvalid(
            Reason.UNSUPPORTED_FIELD, f"field {name} is not served: expected {expected}, got {show(value)}"
        )


def show(value: Any) -> str:
    """A value as a message quotes it: short, whatever was sent."""
    text = repr(value) if isinstance(value, str | int | float | bool) else f"{type(value).__name__} {value!r}"
    return text if len(text) <= 120 else text[:117] + "..."


def is_positive_int(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def is_number(value: Any) -> bool:
    """Finite, and small enough for float32. (Python compares any integer with a float exactly.)"""
    return type(value) in (int, float) and abs(value) < 1e30


def is_true(value: Any) -> bool:
    return value is True


def is_text_or_texts(value: Any) -> bool:
    return isinstance(value, str) or is_texts(value)


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def is_token_ids(value: Any) -> bool:
    """A list of natural numbers that is not empty."""
    return isinstance(value, list) and bool(value) and all(type(v) is int and 0 <= v < 1 << 31 for v in value)


def is_layers(value: Any) -> bool:
    """One layer number or a list of them."""
    return all(type(v) is int and 0 <= v < 1 << 31 for v in (value if isinstance(value, list) else [value]))


def is_pattern_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """An object whose keys are at most MAX_PATTERNS patterns and whose values pass `accepts`."""
    return lambda value: (
        isinstance(value, dict) and len(value) <= MAX_PATTERNS and all(accepts(v) for v in value.values())
    )
