"""A classification head alone on the untouched base: what every other method with a head is to be compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftmux.trainer.errors import OptionError
from peftmux.trainer.methods.base import AttachContext, AttachedAdapter, Method


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """It has no options of its own."""


def _attach(model: Any, config: HeadConfig, context: AttachContext) -> AttachedAdapter:
    if not context.labels:
        raise OptionError("task", "head trains a classifier alone: give --task sequence or --task token")
    return AttachedAdapter("head", model, {}, {"peft_type": "HEAD"})


HEAD = Method(
    name="head",
    summary="a classification head alone",
    config_class=HeadConfig,
    attach=_attach,
    learning_rate=lambda hidden_size: 1e-2,
)
