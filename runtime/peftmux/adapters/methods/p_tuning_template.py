"""P-Tuning at template positions: groups of virtual tokens in front of, inside and after the prompt.

Source: Liu et al., 2021, arXiv 2103.10385, whose templates are {[P_0 .. P_i], x, [P_i+1 .. P_m]}. No library writes
such files: they are PEFT's two files with peft_type P_TUNING_TEMPLATE, `prompt_embeddings` [m, D], the virtual tokens
of all groups in the order of the config, and the groups:

    "template": [{"tokens": 3, "at": 0}, {"tokens": 2, "at": -1}]

`at` counts tokens of the encoded prompt (special ones included): k >= 0 is before its k-th token, counted from 0; -1 is
after its last token, -2 before its last, and so on. Groups that meet keep their order, those with at >= 0 first. A
prompt too short for a position is refused. Positions count virtual and real tokens alike, from 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import FieldTable, Honoured, is_positive_int, read_fields
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.methods.ledger import Ledger
from peftmux.adapters.methods.p_tuning import FIELDS as P_TUNING_FIELDS
from peftmux.adapters.methods.prompt import TENSOR, claim_prompt
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes
from peftmux.adapters.parts import VIRTUAL_TOKENS, TokenGroup, VirtualRows, VirtualTokens

MAX_GROUPS = 1024


def _is_template(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_GROUPS and all(map(_is_group, value))


def _is_group(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"tokens", "at"}:
        return False
    return is_positive_int(value["tokens"]) and type(value["at"]) is int and abs(value["at"]) < 1 << 31


FIELDS: FieldTable = {
    **P_TUNING_FIELDS,
    "template": Honoured(
        None, _is_template, f'a list of at most {MAX_GROUPS} objects {{"tokens": a positive integer, "at": an integer}}'
    ),
}


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and the one tensor against the base's embeddings."""
    fields = read_fields(config, FIELDS)
    if not base.takes_virtual_tokens:
        raise AdapterInvalid(
            Reason.UNSUPPORTED_SITE, f"expected a base whose input embedding is a table, got {base.architecture}"
        )
    if fields["template"] is None:
        raise AdapterInvalid(Reason.INVALID_FIELD, "field template: expected a list of groups, got nothing")
    groups = tuple(TokenGroup(group["tokens"], group["at"]) for group in fields["template"])
    total = sum(group.tokens for group in groups)
    if fields["num_virtual_tokens"] not in (None, total):
        raise AdapterInvalid(
            Reason.INVALID_FIELD,
            f"field num_virtual_tokens: expected {total}, the template's, got {fields['num_virtual_tokens']}",
        )
    ledger = Ledger(shapes)
    claim_prompt({**fields, "num_virtual_tokens": total}, ledger, base)
    ledger.close()
    return Plan("p-tuning", partial(_build, groups=groups))


def _build(tensors: Mapping[str, Tensor], groups: Sequence[TokenGroup]) -> Parts:
    """What always stands in front is computed once; the rest is resolved where a request's tokens are embedded."""
    pieces = list(zip(groups, tensors[TENSOR].split([group.tokens for group in groups]), strict=True))
    front = [piece for group, piece in pieces if group.at == 0]
    rest = [(group, piece) for group, piece in pieces if group.at != 0]
    return Parts(
        others={VIRTUAL_TOKENS: (VirtualRows(torch.cat([piece for _, piece in rest])),)} if rest else {},
        virtual=VirtualTokens(torch.cat(front).unsqueeze(0)) if front else None,
        template=tuple(group for group, _ in rest),
    )


METHOD = Method("P_TUNING_TEMPLATE", plan, lambda base: (), generates=True)
