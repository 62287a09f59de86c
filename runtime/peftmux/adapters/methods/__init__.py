"""The methods that can be lowered, one file and one registration each, by the `peft_type` of their files."""

from __future__ import annotations

from peftmux.adapters.methods import (
    adalora,
    adapterhub,
    beft,
    diffpruning,
    head,
    ia3,
    ladder,
    ln_tuning,
    loha,
    lokr,
    lora,
    loramoe,
    mixlora,
    multitask_prompt,
    p_tuning,
    p_tuning_template,
    prefix,
    prompt,
    shira,
    trainable_tokens,
    vera,
    vora,
    whole,
    xlora,
)
from peftmux.adapters.methods.registry import Method

METHODS: dict[str, Method] = {
    method.peft_type: method
    for method in (
        lora.METHOD,
        adalora.METHOD,
        loramoe.METHOD,
        mixlora.METHOD,
        vera.METHOD,
        loha.METHOD,
        lokr.METHOD,
        prefix.METHOD,
        ia3.METHOD,
        beft.METHOD,
        whole.BITFIT,
        ln_tuning.METHOD,
        whole.LAYERS,
        shira.METHOD,
        diffpruning.METHOD,
        trainable_tokens.METHOD,
        adapterhub.METHOD,
        multitask_prompt.METHOD,
        p_tuning.METHOD,
        p_tuning_template.METHOD,
        prompt.METHOD,
        vora.METHOD,
        ladder.METHOD,
        xlora.METHOD,
        head.METHOD,
    )
}
