"""New rows for the vocabulary's weights beside a method's own tensors: modules_to_save and trainable tokens.

A module of modules_to_save has its whole weight in the files, `<module>.weight` [V, D] (and `.bias`); trainable tokens
some rows of it, `<module>.token_adapter.trainable_tokens_delta` [n, D]. Both stand for the base's rows, despite the
name. Where the output projection is tied to the input embedding, trainable tokens of the embedding are its own too,
while PEFT saves either module of modules_to_save by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import Honoured, is_texts, is_token_ids
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.methods.ledger import PREFIX, Ledger
from peftmux.adapters.parts import EmbeddingPart, NormPart, Part, ReplacedRows

_SAVED, _TOKENS = "modules_to_save", "trainable_token_indices"


def _is_token_indices(value: Any) -> bool:
    return all(is_token_ids(ids) for ids in (value.values() if isinstance(value, dict) else [value]))


FIELDS = {
    _SAVED: Honoured(None, is_texts, "a list of module names"),
    _TOKENS: Honoured(None, _is_token_indices, "a list of token ids, or an object of such lists by module name"),
}


@dataclass(frozen=True, slots=True)
class Replacement:
    """New rows of one module: the tensor that holds them, their ids (None: all rows), and its new bias's tensor."""

    rows: str
    ids: tuple[int, ...] | None = None
    bias: str | None = None


def plan_replaced(fields: Mapping[str, Any], base: BaseModel, ledger: Ledger) -> dict[str, Replacement]:
    """By module path: the input embedding, the output projection, or both. Claims their tensors."""
    saved = {module for name in dict.fromkeys(fields[_SAVED] or ()) for module in _modules(_SAVED, name, base)}
    tokens = _token_ids(fields, base)
    if both := sorted(saved & tokens.keys()):
        raise AdapterInvalid(
            Reason.INVALID_FIELD, f"field {_TOKENS}: expected modules that {_SAVED} does not name, got {both[0]}"
        )
    _refuse_unnamed(saved, base, ledger)
    whole = {m: _plan_whole(m, base, ledger) for m in sorted(saved)}
    return whole | _plan_tokens(tokens, base, ledger, "token_adapter.trainable_tokens_delta")


def plan_whole_modules(fields: Mapping[str, Any], base: BaseModel, ledger: Ledger) -> dict[str, Replacement]:
    """By module path, those that modules_to_save names. Claims their tensors."""
    saved = {module for name in dict.fromkeys(fields[_SAVED] or ()) for module in _modules(_SAVED, name, base)}
    return {m: _plan_whole(m, base, ledger) for m in sorted(saved)}


def plan_tokens(given: Mapping[str, list[int]], base: BaseModel, ledger: Ledger, suffix: str) -> dict[str, Replacement]:
    """Trainable tokens by module name, in tensors `<module>.<suffix>`; a head that is tied to one follows."""
    return _plan_tokens(_token_ids({_TOKENS: dict(given)}, base), base, ledger, suffix)


def build_replaced(
    plan: Mapping[str, Replacement], tensors: Mapping[str, Tensor], base: BaseModel
) -> dict[str, tuple[Part, ...]]:
    """The parts of the modules, by their paths."""
    parts: dict[str, tuple[Part, ...]] = {}
    for module, new in plan.items():
        ids = None if new.ids is None else torch.tensor(new.ids)
        rows, bias = tensors[new.rows], tensors[new.bias] if new.bias else None
        if module == base.embedding:
            parts[module] = (EmbeddingPart(ids=ids, rows=rows),)
        elif module in base.norm_sites:
            parts[module] = (NormPart(rows, bias),)
        else:
            conv1d = base.linear_sites[module].conv1d
            parts[module] = (ReplacedRows(rows.t().contiguous() if conv1d else rows, ids, bias),)
    return parts


def _modules(field: str, name: str, base: BaseModel) -> list[str]:
    """What PEFT takes a name in these fields for: every module whose path ends with it."""
    found = sorted(module for module in base.module_names if module.endswith(name))
    if not found:
        raise AdapterInvalid(
            Reason.UNKNOWN_SITE,
            f"field {field}: expected modules of {base.architecture}, got {name!r}, not in this base",
        )
    ends = (base.embedding, base.head)
    whole = (*base.linear_sites, *base.norm_sites) if field == _SAVED else ()
    for module in found:
        if module not in ends and module not in whole:
            served = " or ".join(m for m in ends if m) or "nothing"
            also = ", a linear or a normalisation layer" if field == _SAVED else ""
            raise AdapterInvalid(
                Reason.UNSUPPORTED_SITE,
                f"field {field}: expected {served}{also}, which can be replaced in {base.architecture}, got {module}",
            )
    return found


def _token_ids(fields: Mapping[str, Any], base: BaseModel) -> dict[str, tuple[int, ...]]:
    """The trainable tokens by module: those that the config names, and the head that is tied to one."""
    given = fields[_TOKENS] or {}
    if isinstance(given, list):
        if not base.embedding:
            raise AdapterInvalid(
                Reason.UNSUPPORTED_SITE,
                f"field {_TOKENS}: expected an input embedding that is a plain table, got that of {base.architecture}",
            )
        given = {base.embedding: given}
    tokens: dict[str, tuple[int, ...]] = {}
    for name, ids in given.items():
        for module in _modules(_TOKENS, name, base):
            if module in tokens:
                raise AdapterInvalid(Reason.INVALID_FIELD, f"field {_TOKENS}: expected {module} once, got it twice")
            tokens[module] = _checked_ids(ids, _shape(module, base)[0])
    if base.tied and base.head and base.embedding in tokens:
        tokens.setdefault(base.head, tokens[base.embedding])
    return tokens


def _checked_ids(ids: list[int], rows: int) -> tuple[int, ...]:
    if max(ids) >= rows:
        raise AdapterInvalid(
            Reason.INVALID_FIELD, f"field {_TOKENS}: expected ids below this base's {rows}, got {max(ids)}"
        )
    twice, times = Counter(ids).most_common(1)[0]
    if times > 1:
        raise AdapterInvalid(Reason.INVALID_FIELD, f"field {_TOKENS}: expected each id once, got {twice} twice")
    return tuple(ids)


def _plan_tokens(
    tokens: Mapping[str, tuple[int, ...]], base: BaseModel, ledger: Ledger, suffix: str
) -> dict[str, Replacement]:
    """Tied ends with the same tokens have one tensor; PEFT takes different tokens for a wish to untie them."""
    plan: dict[str, Replacement] = {}
    for module in sorted(tokens, key=lambda module: module != base.embedding):
        source = plan.get(base.embedding)
        own = f"{PREFIX}{module}.{suffix}" in ledger
        if base.tied and source is not None and source.ids == tokens[module] and not own:
            plan[module] = source
        else:
            plan[module] = _plan_rows(module, tokens[module], base, ledger, suffix)
    if base.head in plan and base.linear_sites[base.head].has_bias:
        raise AdapterInvalid(
            Reason.UNSUPPORTED_FIELD,
            f"field {_TOKENS}: expected an output projection without bias (PEFT drops it), got {base.head} with one",
        )
    return plan


def _plan_rows(module: str, ids: tuple[int, ...], base: BaseModel, ledger: Ledger, suffix: str) -> Replacement:
    name = f"{PREFIX}{module}.{suffix}"
    ledger.claim(name, (len(ids), _shape(module, base)[1]))
    return Replacement(name, ids)


def _plan_whole(module: str, base: BaseModel, ledger: Ledger) -> Replacement:
    weight, bias = f"{PREFIX}{module}.weight", f"{PREFIX}{module}.bias"
    if module in base.norm_sites:
        norm = base.norm_sites[module]
        ledger.claim(weight, (norm.features,))
        biased, size = norm.has_bias, norm.features
    else:
        site = base.linear_sites.get(module)
        shape = _shape(module, base)
        ledger.claim(weight, shape[::-1] if site is not None and site.conv1d else shape)
        biased, size = site is not None and site.has_bias, shape[0]
    if not biased:
        return Replacement(weight)
    ledger.claim(bias, (size,))
    return Replacement(weight, bias=bias)


def _refuse_unnamed(saved: set[str], base: BaseModel, ledger: Ledger) -> None:
    """PEFT also saves whole embeddings that its config does not name, after the vocabulary was resized."""
    for module in (base.embedding, base.head):
        name = f"{PREFIX}{module}.weight"
        if module and module not in saved and name in ledger:
            ledger.claim(name, _shape(module, base))
            raise AdapterInvalid(
                Reason.UNUSED_TENSOR, f"tensor {name}: expected {module} in {_SAVED}, which does not name it"
            )


def _shape(module: str, base: BaseModel) -> tuple[int, int]:
    """[V, D] of the input embedding or the output projection."""
    if module == base.embedding:
        rows, width = base.embedding_weight().shape
        return rows, width
    site = base.linear_sites[module]
    return site.out_features, site.in_features
