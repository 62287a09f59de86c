"""Training methods by name: one strategy file each, one registration each (the tuple below)."""

from __future__ import annotations

from collections.abc import Mapping

from peftmux.trainer.errors import OptionError
from peftmux.trainer.methods.base import AttachContext, AttachedAdapter, Method
from peftmux.trainer.methods.dora import DORA
from peftmux.trainer.methods.lora import LORA
from peftmux.trainer.methods.prefix import PREFIX
from peftmux.trainer.methods.rslora import RSLORA

__all__ = ["METHODS", "AttachContext", "AttachedAdapter", "Method", "get_method"]

METHODS: Mapping[str, Method] = {method.name: method for method in (LORA, RSLORA, DORA, PREFIX)}


def get_method(name: str) -> Method:
    """Raises OptionError for a name that is not registered."""
    try:
        return METHODS[name]
    except KeyError:
        raise OptionError("method", f"expected one of {', '.join(METHODS)}; got {name!r}") from None
