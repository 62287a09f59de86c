"""Training methods by name: one strategy file each, one registration each (the tuple below)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftmux.trainer.errors import OptionError
from peftmux.trainer.methods.adalora import ADALORA
from peftmux.trainer.methods.base import AttachContext, AttachedAdapter, Method
from peftmux.trainer.methods.bitfit import BITFIT
from peftmux.trainer.methods.bottleneck import HOULSBY, PARALLEL, PFEIFFER
from peftmux.trainer.methods.diffpruning import DIFFPRUNING
from peftmux.trainer.methods.dora import DORA
from peftmux.trainer.methods.fusion import FUSION
from peftmux.trainer.methods.head import HEAD
from peftmux.trainer.methods.ia3 import IA3
from peftmux.trainer.methods.ladder import LADDER
from peftmux.trainer.methods.layers import LAYERS
from peftmux.trainer.methods.ln import LN
from peftmux.trainer.methods.lora import LORA
from peftmux.trainer.methods.lora_plus import LORA_PLUS
from peftmux.trainer.methods.loramoe import LORAMOE
from peftmux.trainer.methods.mixlora import MIXLORA
from peftmux.trainer.methods.multitask_prompt import MULTITASK_PROMPT
from peftmux.trainer.methods.p_tuning import P_TUNING
from peftmux.trainer.methods.pissa import PISSA
from peftmux.trainer.methods.prefix import P_TUNING_V2, PREFIX
from peftmux.trainer.methods.prompt import PROMPT
from peftmux.trainer.methods.rslora import RSLORA
from peftmux.trainer.methods.shira import SHIRA
from peftmux.trainer.methods.vora import VORA

__all__ = ["ALIASES", "METHODS", "AttachContext", "AttachedAdapter", "Method", "get_method", "unaliased"]

_ALL = (
    *(LORA, RSLORA, LORA_PLUS, PISSA, DORA, ADALORA),
    *(PREFIX, P_TUNING_V2, PROMPT, MULTITASK_PROMPT, P_TUNING),
    *(IA3, LN, BITFIT, LAYERS, SHIRA, DIFFPRUNING, LADDER, VORA, HEAD),
    *(LORAMOE, MIXLORA),
    *(HOULSBY, PFEIFFER, PARALLEL, FUSION),
)

METHODS: Mapping[str, Method] = {method.name: method for method in _ALL}


ALIASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {"qlora": ("lora", {"quantization": "nf4"})}
"""Names of a method with options of the run: lora over a base in 4 bits (Dettmers et al., 2023, arXiv 2305.14314)."""


def get_method(name: str) -> Method:
    """Raises OptionError for a name that is not registered."""
    try:
        return METHODS[name]
    except KeyError:
        names = ", ".join([*METHODS, *ALIASES])
        raise OptionError("method", f"expected one of {names}; got {name!r}") from None


def unaliased(name: str, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The method that `name` stands for, and its options: those that are given win over the alias's own."""
    method, own = ALIASES.get(name, (name, {}))
    return method, {**own, **given}
