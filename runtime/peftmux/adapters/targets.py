"""Which of the base's modules a config targets: PEFT's rules for target_modules and what narrows it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import Honoured, is_layers, is_text_or_texts, show
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.patterns import PatternMatcher

_NAMES = "a list of module names or a regular expression"
FIELDS = {
    "target_modules": Honoured(None, is_text_or_texts, f'{_NAMES}, or "all-linear"'),
    "exclude_modules": Honoured(None, is_text_or_texts, _NAMES),
    "layers_to_transform": Honoured(None, is_layers, "a layer number or a list of them"),
    "layers_pattern": Honoured(None, is_text_or_texts, "a name or a list of names"),
}


def target_sites(
    fields: Mapping[str, Any],
    present: Iterable[str],
    base: BaseModel,
    matcher: PatternMatcher,
    others: Container[str] = (),
) -> list[str]:
    """The linear sites of the base that the config targets, in name order; with them those of `others`.

    `present` are the sites that have tensors; they stand in for target_modules where that is unset (PEFT then takes a
    list it keeps for each architecture). Raises AdapterInvalid where a targeted module is neither a linear site nor
    one of `others`.
    """
    targets = fields["target_modules"]
    if targets is None:
        targets = sorted({site.rsplit(".", 1)[-1] for site in present})
    chosen = sorted(matched_modules({**fields, "target_modules": targets}, base, matcher))
    for site in chosen:
        if site not in base.linear_sites and site not in others:
            raise AdapterInvalid(
                Reason.UNSUPPORTED_SITE,
                f"field target_modules: expected linear layers that are served in {base.architecture}, got {site}",
            )
    if not chosen:
        raise AdapterInvalid(
            Reason.NO_SITES, f"field target_modules: {show(targets)} matches no linear layer of {base.architecture}"
        )
    return chosen


def matched_modules(fields: Mapping[str, Any], base: BaseModel, matcher: PatternMatcher) -> list[str]:
    """Every module that target_modules names, whatever its type, without those that are excluded or saved whole."""
    targets = fields["target_modules"]
    _check_layers(fields, targets)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        chosen = [site for site in base.linear_sites if site != base.head]
    else:
        chosen = list(_matching(fields, targets, base, matcher))
    return list(_allowed(fields, chosen, matcher))


def _matching(
    fields: Mapping[str, Any], targets: str | list[str], base: BaseModel, matcher: PatternMatcher
) -> Iterator[str]:
    names = base.module_names | base.linear_sites.keys()
    if isinstance(targets, str):
        yield from (name for name in names if matcher.full("target_modules", targets, name))
        return
    wanted = set(targets)
    for name in names:  # a module given by its whole name is meant whatever the layers
        if name in wanted or (wanted.intersection(_endings(name)) and _in_layers(fields, name, matcher)):
            yield name


def _check_layers(fields: Mapping[str, Any], targets: str | list[str]) -> None:
    """PEFT refuses to build these combinations, so no file of its own has them."""
    narrowing = [name for name in ("layers_to_transform", "layers_pattern") if fields[name] is not None]
    if narrowing and isinstance(targets, str):
        raise AdapterInvalid(
            Reason.INVALID_FIELD,
            f"field {narrowing[0]}: expected a list in target_modules with it, got {show(targets)}",
        )
    if narrowing == ["layers_pattern"]:
        raise AdapterInvalid(Reason.INVALID_FIELD, "field layers_pattern: expected layers_to_transform with it")


def _in_layers(fields: Mapping[str, Any], name: str, matcher: PatternMatcher) -> bool:
    layers, patterns = fields["layers_to_transform"], fields["layers_pattern"] or []
    if layers is None:
        return True
    index = matcher.layer_index("layers_pattern", [patterns] if isinstance(patterns, str) else patterns, name)
    return index is not None and index in (layers if isinstance(layers, list) else [layers])


def _allowed(fields: Mapping[str, Any], names: Iterable[str], matcher: PatternMatcher) -> Iterator[str]:
    """Those that are not excluded, nor saved whole: PEFT puts no adapter there."""
    excluded = fields["exclude_modules"] or []
    pattern, listed = (excluded, []) if isinstance(excluded, str) else (None, excluded)
    withheld = {*listed, *(fields.get("modules_to_save") or [])}
    for name in names:
        by_pattern = pattern is not None and matcher.full("exclude_modules", pattern, name)
        if not by_pattern and withheld.isdisjoint(_endings(name)):
            yield name


def _endings(name: str) -> list[str]:
    """The name itself and every ending of it that begins after a dot."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
