"""From an adapter's files to the parts that the engine knows. Fails closed: exactly what the files say, or an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import show
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.files import MAX_TENSOR_BYTES, AdapterFiles, open_adapter
from peftmux.adapters.heads import HeadPlan, split_head
from peftmux.adapters.methods import METHODS
from peftmux.adapters.methods.registry import Plan, Shapes
from peftmux.adapters.parts import LinearPart, LoweredAdapter, Part, Parts


def load_adapter(
    path: str | Path, base: BaseModel, *, root: str | Path | None = None, max_bytes: int = MAX_TENSOR_BYTES
) -> LoweredAdapter:
    """Read, check and lower a PEFT adapter folder for `base`.

    Names, shapes and fields are checked before the tensors are read. `root` and `max_bytes` as `open_adapter`.
    Raises AdapterInvalid with a Reason, SourceNotFound, SourceForbidden.
    """
    with open_adapter(path, root=root, max_bytes=max_bytes) as adapter:
        plan = plan_adapter(adapter.config, {name: info.shape for name, info in adapter.tensors.items()}, base)
        files = adapter.read()
    return _lower(files, plan)


def lower(files: AdapterFiles, base: BaseModel) -> LoweredAdapter:
    """The parts of an adapter on `base`. Every tensor is used exactly once. Raises AdapterInvalid with a Reason."""
    shapes = {name: tuple(t.shape) for name, t in files.tensors.items()}
    return _lower(files, plan_adapter(files.config, shapes, base))


def _lower(files: AdapterFiles, plan: Plan) -> LoweredAdapter:
    """As planned for these files' config and shapes."""
    parts = plan.build({name: _finite(f"tensor {name}", tensor) for name, tensor in files.tensors.items()})
    for place, part in parts.placed():
        _check_derived(place, part)
    if parts.virtual is not None:
        _finite("the virtual tokens that follow", parts.virtual.embeddings)
    return LoweredAdapter(
        kind=plan.kind,
        digest=files.digest,
        parts=parts,
        invocation=plan.invocation,
        tensors=len(files.tensors),
        parameters=sum(t.numel() for t in files.tensors.values()),
        warnings=plan.warnings,
    )


def plan_adapter(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Everything that can be judged without the tensors' values."""
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or not peft_type:
        raise AdapterInvalid(
            Reason.UNSUPPORTED_FORMAT, f"field peft_type: expected {_served()} as PEFT writes it, got none"
        )
    if peft_type not in METHODS:
        raise AdapterInvalid(
            Reason.UNSUPPORTED_METHOD,
            f"field peft_type: expected {_served()}, got {peft_type[:80]!r}, which is not served",
        )
    method, split = METHODS[peft_type], split_head(config, shapes, base)
    if split is not None:
        if method.generates:
            got = show(config.get("task_type"))
            raise AdapterInvalid(
                Reason.UNSUPPORTED_TASK, f"field task_type: expected CAUSAL_LM with {peft_type}, got {got}"
            )
        return _with_head(method.plan(split.config, split.shapes, split.base), split.head)
    if method.needs_head:
        got = show(config.get("task_type"))
        raise AdapterInvalid(
            Reason.UNSUPPORTED_TASK, f"field task_type: expected SEQ_CLS or TOKEN_CLS with {peft_type}, got {got}"
        )
    return method.plan(config, shapes, base)


def _with_head(plan: Plan, head: HeadPlan) -> Plan:
    if plan.invocation:
        raise AdapterInvalid(
            Reason.UNSUPPORTED_TASK,
            "field task_type: expected CAUSAL_LM with alora_invocation_tokens (PEFT serves no other), got a classifier",
        )

    def build(tensors: Mapping[str, Tensor]) -> Parts:
        rest = {name: tensor for name, tensor in tensors.items() if name not in head.tensors}
        parts = plan.build(rest)
        own = dataclasses.replace(head.build(tensors), reads_padding=parts.virtual is not None)
        return dataclasses.replace(parts, head=own)

    return dataclasses.replace(plan, build=build)


def served_kinds(base: BaseModel) -> tuple[str, ...]:
    """The kinds of adapter that can be lowered for this base."""
    return tuple(kind for method in METHODS.values() for kind in method.kinds(base))


def _served() -> str:
    return " or ".join(sorted(METHODS))


def _check_derived(place: str, part: LinearPart | Part) -> None:
    """What lowering computed can overflow, or be divided by a zero norm, where every stored value is finite."""
    for piece in dataclasses.fields(part):
        value = getattr(part, piece.name)
        if isinstance(value, Tensor):
            _finite(f"the {piece.name} that follows for {place}", value)


def _finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor as finite float32; integers, which are indices, as they are.

    The smallest and largest value show it: NaN propagates through both.
    """
    if not tensor.is_floating_point():
        return tensor.detach().cpu()
    values = tensor.detach().to(device="cpu", dtype=torch.float32)
    if values.numel() and not torch.stack(torch.aminmax(values)).isfinite().all():
        raise AdapterInvalid(Reason.NOT_FINITE, f"{name}: expected finite float32 values, got NaN or infinity")
    return values
