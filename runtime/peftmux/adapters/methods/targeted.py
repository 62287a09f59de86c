"""What PEFT's methods at targeted linear layers have in common: the layers, and whole modules saved beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peftmux.adapters import targets
from peftmux.adapters.base import BaseModel, LinearSite
from peftmux.adapters.config import COMMON, FieldTable, read_fields
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.methods import replaced
from peftmux.adapters.methods.ledger import PREFIX, Ledger
from peftmux.adapters.methods.lora_linear import check_copy, claim_copy
from peftmux.adapters.methods.registry import Parts, Plan, Shapes
from peftmux.adapters.parts import Part
from peftmux.adapters.patterns import PatternMatcher

FIELDS: FieldTable = {**COMMON, **targets.FIELDS, "modules_to_save": replaced.FIELDS["modules_to_save"]}


@dataclass(frozen=True, slots=True)
class Targeted:
    """A config read, with the layers it targets in name order. `finish` makes the plan once all is claimed."""

    fields: Mapping[str, Any]
    sites: tuple[LinearSite, ...]
    ledger: Ledger
    matcher: PatternMatcher
    base: BaseModel
    whole: Mapping[str, replaced.Replacement]
    copies: Mapping[str, str]
    """Layer -> the copy of its weight that PEFT saves beside an adapter of the vocabulary."""

    def stem(self, site: LinearSite, *suffixes: str) -> list[str]:
        """The names of a layer's tensors."""
        return [f"{PREFIX}{site.name}.{suffix}" for suffix in suffixes]

    def finish(self, kind: str, build: Callable[[Mapping[str, Tensor]], Parts]) -> Plan:
        """`build` makes the method's own parts; modules saved whole are added to them."""
        self.ledger.close()
        whole, base = self.whole, self.base

        def build_all(tensors: Mapping[str, Tensor]) -> Parts:
            for site, copy in self.copies.items():
                check_copy(site, tensors[copy], base.weight(site))
            parts = build(tensors)
            others: dict[str, tuple[Part, ...]] = replaced.build_replaced(whole, tensors, base)
            return Parts(parts.linear, {**others, **parts.others})

        inferred = self.fields["target_modules"] is None
        warnings = ("target_modules is unset: the sites are those that have tensors",) if inferred else ()
        return Plan(kind, build_all, warnings)


def read_targeted(
    config: Mapping[str, Any], table: FieldTable, shapes: Shapes, base: BaseModel, suffixes: Sequence[str]
) -> Targeted:
    """`suffixes` name a layer's tensors; they tell the layers where target_modules is unset."""
    fields = read_fields(config, table)
    ledger, matcher = Ledger(shapes), PatternMatcher()
    whole = replaced.plan_whole_modules(fields, base, ledger)
    present = modules_of(ledger, suffixes, base)
    names = targets.target_sites(fields, present, base, matcher)
    if both := sorted(whole.keys() & set(names)):
        raise AdapterInvalid(
            Reason.INVALID_FIELD, f"field target_modules: expected no module that is replaced as well, got {both[0]}"
        )
    sites = tuple(base.linear_sites[n] for n in names)
    shapes_of = {s.name: (s.out_features, s.in_features) for s in sites}
    copies = {site: copy for site, shape in shapes_of.items() if (copy := claim_copy(ledger, PREFIX + site, shape))}
    return Targeted(fields, sites, ledger, matcher, base, whole, copies)


def modules_of(ledger: Ledger, suffixes: Sequence[str], base: BaseModel) -> set[str]:
    """The modules that tensors with these endings name. Raises where one is not in the base."""
    found = set()
    for name in ledger.unclaimed():
        suffix = next((s for s in suffixes if name.endswith(f".{s}")), None)
        if suffix is None or not name.startswith(PREFIX):
            continue
        module = name[len(PREFIX) : -len(suffix) - 1]
        if module not in base.module_names and module not in base.linear_sites:
            raise AdapterInvalid(
                Reason.UNKNOWN_SITE,
                f"tensor {name}: expected a module of {base.architecture}, but {module} is not in this base",
            )
        found.add(module)
    return found


def refuse_conv1d(targeted: Targeted, method: str) -> None:
    """PEFT has this method for nn.Linear alone."""
    for site in targeted.sites:
        if site.conv1d:
            raise AdapterInvalid(
                Reason.UNSUPPORTED_SITE, f"field target_modules: {method} expects nn.Linear layers, got {site.name}"
            )
