"""What AdapterHub saves: bottlenecks, fusions of them, its LoRA, IA3, prefixes and heads. See `adapters.hub`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import show
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.files import CONFIG_FILE
from peftmux.adapters.hub import PEFT_TYPE
from peftmux.adapters.hub_fields import OUTER, read_outer
from peftmux.adapters.methods.bottleneck import BottleneckPlan, kind_of, plan_bottlenecks
from peftmux.adapters.methods.hub_fusion import plan_hub_fusion
from peftmux.adapters.methods.hub_heads import plan_hub_heads
from peftmux.adapters.methods.hub_interface import Interface, read_interface
from peftmux.adapters.methods.hub_lora import plan_hub_lora
from peftmux.adapters.methods.hub_prefix import plan_hub_prefix
from peftmux.adapters.methods.ledger import Ledger
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes


@dataclasses.dataclass(frozen=True, slots=True)
class _Adapter:
    """One adapter's config. version: of the library that wrote it."""

    name: str
    own: Mapping[str, Any]
    version: str | None
    interface: Interface


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the configs and every tensor's name and shape against the base."""
    outer, fusion = config.get("adapters"), config.get("fusion")
    if not isinstance(outer, dict) or not outer:
        raise AdapterInvalid(Reason.MALFORMED_CONFIG, f"{PEFT_TYPE} is the name of AdapterHub's folders, not of a file")
    ledger = Ledger(shapes)
    interfaces = config.get("interfaces") or {}
    adapters = [_read(name, adapter, interfaces.get(name), base) for name, adapter in outer.items()]
    heads = plan_hub_heads(config, shapes, ledger, base)
    if fusion is not None:
        found = plan_hub_fusion(fusion, {a.name: _plan_bottlenecks(a, ledger, base) for a in adapters}, ledger, base)
    else:
        (adapter,) = adapters
        found = _plan_one(adapter, ledger, base)
    ledger.close()

    def build(tensors: Mapping[str, Tensor]) -> Parts:
        parts = found.build(tensors)
        head, others = heads(tensors)
        return dataclasses.replace(parts, others={**parts.others, **others}, head=head)

    return Plan(found.kind, build)


def _read(name: str, outer: Any, interface: Any, base: BaseModel) -> _Adapter:
    own = outer.get("config") if isinstance(outer, dict) else None
    if not isinstance(own, dict):
        raise AdapterInvalid(
            Reason.MALFORMED_CONFIG, f"field config of {CONFIG_FILE}: expected an object, got {show(own)}"
        )
    fields = read_outer(outer, OUTER, CONFIG_FILE, base)
    return _Adapter(name, own, fields["version"], read_interface(interface, base))


def _plan_one(adapter: _Adapter, ledger: Ledger, base: BaseModel) -> Plan:
    architecture = adapter.own.get("architecture")
    if architecture == "lora":
        return plan_hub_lora(adapter.name, adapter.own, adapter.version, adapter.interface, ledger, base)
    if architecture == "prefix_tuning":
        return plan_hub_prefix(adapter.name, adapter.own, ledger, base)
    plans = _plan_bottlenecks(adapter, ledger, base)
    return Plan(kind_of(adapter.own), partial(_build_bottlenecks, plans))


def _plan_bottlenecks(adapter: _Adapter, ledger: Ledger, base: BaseModel) -> dict[str, BottleneckPlan]:
    architecture = adapter.own.get("architecture")
    if architecture is not None:
        several = " (several methods in one, such as MAM and UniPELT)" if architecture == "union" else ""
        raise AdapterInvalid(
            Reason.UNSUPPORTED_METHOD,
            "field architecture: expected a bottleneck, lora or prefix_tuning, "
            f"got {str(architecture)[:80]!r}{several}, which is not served",
        )
    plans = plan_bottlenecks(adapter.own, adapter.name, f"adapter/{adapter.name}/", ledger, base)
    first = next(iter(plans.values()))
    adapter.interface.check_branches(
        [base.branches[name] for name in plans], first.reads, first.fields["original_ln_after"]
    )
    return plans


def _build_bottlenecks(plans: Mapping[str, BottleneckPlan], tensors: Mapping[str, Tensor]) -> Parts:
    return Parts(others={branch: (plan.build(tensors),) for branch, plan in plans.items()})


def kinds(base: BaseModel) -> tuple[str, ...]:
    return ("houlsby", "pfeiffer", "parallel", "bottleneck", "fusion") if base.branches else ()


METHOD = Method(PEFT_TYPE, plan, kinds)
