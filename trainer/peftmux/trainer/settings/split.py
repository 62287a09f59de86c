"""Options by name: those of the run, of the method, and of transformers' TrainingArguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from peftmux.trainer.errors import OptionError
from peftmux.trainer.settings.options import RunOptions

_OLDER = ("warmup_ratio",)
"""Of older versions of transformers; taken by every one."""


def split(config_class: type[Any], values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(the run's, the method's, the training's). Raises OptionError for a name that none of them has."""
    groups: tuple[dict[str, Any], dict[str, Any], dict[str, Any]] = ({}, {}, {})
    names = [[f.name for f in dataclasses.fields(kind) if f.init] for kind in (RunOptions, config_class)]
    names.append([*(f.name for f in dataclasses.fields(TrainingArguments) if f.init), *_OLDER])
    for name, value in values.items():
        group = next((own for own, known in zip(groups, names, strict=True) if name in known), None)
        if group is None:
            message = f"no such option; expected one of {', '.join([*names[1], *names[0]])}, or a TrainingArguments'"
            raise OptionError(name.replace("_", "-"), message)
        group[name] = value
    return groups


def joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Raises OptionError for a name in both."""
    for name in first.keys() & second.keys():
        raise OptionError(name.replace("_", "-"), f"expected it once, got {first[name]!r} and {second[name]!r}")
    return {**first, **second}
