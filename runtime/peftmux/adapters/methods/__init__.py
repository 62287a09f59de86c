"""The methods that can be lowered, one file and one registration each, by the `peft_type` of their files."""

from __future__ import annotations

from peftmux.adapters.methods import head, lora, loramoe, mixlora, prefix, xlora
from peftmux.adapters.methods.registry import Method

METHODS: dict[str, Method] = {
    method.peft_type: method
    for method in (
        head.METHOD,
        lora.METHOD,
        loramoe.METHOD,
        mixlora.METHOD,
        prefix.METHOD,
        xlora.METHOD,
    )
}
