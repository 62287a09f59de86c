"""A classification head alone: no tensor but the head's, which every method's files may have beside their own.

No library writes such a file. It has PEFT's two files with peft_type HEAD, task_type SEQ_CLS or TOKEN_CLS, and the
head's tensors as PEFT names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import COMMON, FieldTable, Honoured, is_texts, read_fields
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.methods.ledger import Ledger
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes

FIELDS: FieldTable = {
    **COMMON,
    "modules_to_save": Honoured(None, is_texts, "a list of module names"),
}


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """`config` and `shapes` are what the head has left: nothing else may be there."""
    if saved := read_fields(config, FIELDS)["modules_to_save"]:
        raise AdapterInvalid(
            Reason.UNSUPPORTED_SITE, f"field modules_to_save: expected score or classifier, got {saved[0]}"
        )
    Ledger(shapes).close()
    return Plan("head", lambda tensors: Parts())


def kinds(base: BaseModel) -> tuple[str, ...]:
    return ("head",) if base.state_width else ()


METHOD = Method("HEAD", plan, kinds, needs_head=True)
