"""Whole weights and biases in the place of the base's: partial freezing, and BitFit.

No reference writes adapter-sized files of either; ours are the two of PEFT, with the tensors
`base_model.model.<module>.weight` (as the base stores it) and `.bias` of linear layers, normalisation layers, the input
embedding and the output projection. `peft_type` LAYERS may hold any of them (tuning the last layers alone: Lee et al.,
2019, arXiv 1911.03090); of each module that `target_modules` lists it holds all parameters. BITFIT holds biases (Zaken
et al., 2022, arXiv 2106.10199): with `bias_terms` "all" every one, with "query_intermediate" every one of the query
projections and of the feed-forward's first layer. Without these fields what changes is what has tensors.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import COMMON, FieldTable, Honoured, NoEffect, is_texts, read_fields
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.methods.ledger import PREFIX, Ledger
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes
from peftmux.adapters.parts import EmbeddingPart, LinearPart, NormPart, Part, ReplacedRows

_LAYERS: FieldTable = {
    **COMMON,
    "target_modules": Honoured(None, is_texts, "a list of module paths"),
    "trained_layers": NoEffect("what was trained; it is in the files"),
}
_TERMS = ("all", "query_intermediate")
_BITFIT: FieldTable = {**COMMON, "bias_terms": Honoured(None, lambda v: v in _TERMS, " or ".join(_TERMS))}
QUERY_INTERMEDIATE = (
    *("q_proj", "query", "c_attn", "query_key_value", "qkv_proj", "Wqkv"),
    *("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h", "intermediate.dense"),
)
"""Last names of the layers that "query_intermediate" allows."""


def plan_layers(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and every tensor's name and shape against the base."""
    fields, ledger = read_fields(config, _LAYERS), Ledger(shapes)
    modules = _modules(ledger, base, ("weight", "bias"))
    listed = fields["target_modules"]
    if listed is not None:
        if odd := sorted(set(listed) ^ set(modules)):
            raise AdapterInvalid(
                Reason.INVALID_FIELD,
                f"field target_modules: expected exactly the modules that have tensors, got {odd[0]}",
            )
        _check_all_there(((module, _shapes(module, base)) for module in modules), modules)
    ledger.close()
    return Plan("layers", partial(_build, modules=modules, base=base), _unset("target_modules", listed))


def plan_bitfit(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and every tensor's name and shape against the base."""
    fields, ledger = read_fields(config, _BITFIT), Ledger(shapes)
    modules = _modules(ledger, base, ("bias",))
    terms, wanted = fields["bias_terms"], _biases(base)
    if terms == "query_intermediate":
        wanted = [module for module in wanted if module in base.linear_sites and module.endswith(QUERY_INTERMEDIATE)]
        if odd := [module for module in modules if module not in wanted]:
            raise AdapterInvalid(
                Reason.UNSUPPORTED_SITE,
                f"tensor {PREFIX}{odd[0]}.bias: expected query and intermediate layers, as bias_terms says",
            )
    if terms is not None:
        _check_all_there(((module, ("bias",)) for module in wanted), modules)
    ledger.close()
    return Plan("bitfit", partial(_build, modules=modules, base=base), _unset("bias_terms", terms))


def _unset(name: str, value: object) -> tuple[str, ...]:
    return () if value is not None else (f"{name} is unset: what changes is what has tensors",)


def _biases(base: BaseModel) -> list[str]:
    """The modules that have one."""
    linear = [site.name for site in base.linear_sites.values() if site.has_bias]
    return linear + [norm.name for norm in base.norm_sites.values() if norm.has_bias]


def _check_all_there(wanted: Iterable[tuple[str, Iterable[str]]], found: Mapping[str, Container[str]]) -> None:
    for module, names in wanted:
        for name in names:
            if name not in found.get(module, ()):
                raise AdapterInvalid(
                    Reason.MISSING_TENSOR,
                    f"expected tensor {PREFIX}{module}.{name}, which is missing: all of what the config names is saved",
                )


def _modules(ledger: Ledger, base: BaseModel, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """By module, which of its tensors are replaced. Claims them."""
    found: dict[str, tuple[str, ...]] = {}
    for tensor in ledger.unclaimed():
        module, _, name = tensor.removeprefix(PREFIX).rpartition(".")
        shape = _shapes(module, base).get(name) if tensor.startswith(PREFIX) and name in names else None
        if shape is None:
            known = module in base.module_names
            raise AdapterInvalid(
                Reason.UNSUPPORTED_SITE if known else Reason.UNKNOWN_SITE,
                f"tensor {tensor}: expected {' or '.join(f'<module>.{n}' for n in names)} of a module of "
                f"{base.architecture} that is served and has one",
            )
        ledger.claim(tensor, shape)
        found[module] = (*found.get(module, ()), name)
    if not found:
        raise AdapterInvalid(Reason.NO_SITES, "expected tensors of at least one module, got none")
    return found


def _shapes(module: str, base: BaseModel) -> Mapping[str, tuple[int, ...]]:
    """The parameters of a module that can be replaced."""
    shapes: dict[str, tuple[int, ...]] = {}
    if module in base.linear_sites:
        site = base.linear_sites[module]
        sizes = (site.out_features, site.in_features)
        shapes["weight"] = sizes[::-1] if site.conv1d else sizes
        if site.has_bias:
            shapes["bias"] = sizes[:1]
    elif module in base.norm_sites:
        norm = base.norm_sites[module]
        shapes["weight"] = (norm.features,)
        if norm.has_bias:
            shapes["bias"] = (norm.features,)
    elif module and module == base.embedding:
        rows, width = base.embedding_weight().shape
        shapes["weight"] = (rows, width)
    return shapes


def _build(tensors: Mapping[str, Tensor], modules: Mapping[str, tuple[str, ...]], base: BaseModel) -> Parts:
    linear: dict[str, LinearPart] = {}
    others: dict[str, tuple[Part, ...]] = {}
    for module in modules:
        weight, bias = (tensors.get(f"{PREFIX}{module}.{name}") for name in ("weight", "bias"))
        if module in base.norm_sites:
            others[module] = (NormPart(weight, bias),)
        elif module == base.embedding:
            others[module] = (EmbeddingPart(rows=weight),)
        elif weight is not None:
            site, old = base.linear_sites[module], base.bias(module)
            own = bias if bias is not None else None if old is None else old.detach().float().cpu()
            others[module] = (ReplacedRows(weight.t().contiguous() if site.conv1d else weight, None, own),)
        elif bias is not None:
            linear[module] = LinearPart(bias=bias - _old_bias(module, base))
    return Parts(linear, others)


def _old_bias(module: str, base: BaseModel) -> Tensor:
    old = base.bias(module)
    assert old is not None, "a bias is claimed where the base has one"
    return old.detach().float().cpu()


LAYERS = Method("LAYERS", plan_layers, lambda base: ("layers",) if base.linear_sites else ())
BITFIT = Method("BITFIT", plan_bitfit, lambda base: ("bitfit",) if _biases(base) else ())
