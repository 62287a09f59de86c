"""LoRA: y = W x + scale B A x at linear layers and the input embedding, scale alpha / r (rsLoRA: alpha / sqrt(r)).

Source: Hu et al., 2021, arXiv 2106.09685; rsLoRA: Kalajdzievski, 2023, arXiv 2312.03732; activated LoRA, which acts
from the last occurrence of its invocation on: Greenewald et al., 2025, arXiv 2504.12397. PiSSA and LoRA+ are files of
this kind too. Files as PEFT writes them: see `lora_linear`, `lora_embedding` and `replaced` for the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from peftmux.adapters import targets
from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import (
    COMMON,
    MAX_PATTERNS,
    FieldTable,
    Honoured,
    NoEffect,
    is_number,
    is_pattern_of,
    is_positive_int,
    is_token_ids,
    is_true,
    read_fields,
    show,
)
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.methods import lora_experts, replaced
from peftmux.adapters.methods.ledger import PREFIX, Ledger
from peftmux.adapters.methods.lora_embedding import build_embedding, plan_embedding
from peftmux.adapters.methods.lora_experts import ParameterPlan, build_parameters, plan_parameters
from peftmux.adapters.methods.lora_linear import build_linear, plan_linear, plan_norm_biases, plan_plain_biases
from peftmux.adapters.methods.registry import Method, Parts, Plan, Shapes
from peftmux.adapters.parts import NormPart
from peftmux.adapters.patterns import PatternMatcher

__all__ = ["FIELDS", "METHOD", "PREFIX", "kinds", "lora_scaling", "plan"]

_LINEAR_SUFFIXES = (
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_B.bias",
    ".lora_magnitude_vector",
    ".base_layer.weight",
    ".base_layer.bias",
    ".bias",
)
_EMBEDDING_SUFFIXES = (".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector", ".base_layer.weight")
_VOCABULARY = ("embed_tokens", "lm_head")
_INITS = (True, "gaussian", "eva", "orthogonal")
_INIT_RULE = (
    "true, false, gaussian, eva or orthogonal (any other replaces base weights while training: save the adapter with "
    "path_initial_model_for_weight_conversion, which makes it a plain LoRA)"
)

FIELDS: FieldTable = {
    **COMMON,
    **targets.FIELDS,
    **replaced.FIELDS,
    **lora_experts.FIELDS,
    "r": Honoured(8, is_positive_int, "a positive integer"),
    "lora_alpha": Honoured(8, is_number, "a finite number"),
    "rank_pattern": Honoured(
        {}, is_pattern_of(is_positive_int), f"an object of at most {MAX_PATTERNS} positive integers"
    ),
    "alpha_pattern": Honoured({}, is_pattern_of(is_number), f"an object of at most {MAX_PATTERNS} finite numbers"),
    "use_rslora": Honoured(False, is_true, "true or false"),
    "use_dora": Honoured(False, is_true, "true or false"),
    "lora_bias": Honoured(False, is_true, "true or false"),
    "bias": Honoured("none", lambda v: v in ("none", "all", "lora_only"), "none, all or lora_only"),
    "init_lora_weights": Honoured(True, lambda v: v in _INITS, _INIT_RULE, Reason.UNSUPPORTED_FIELD),
    "alora_invocation_tokens": Honoured(None, is_token_ids, "a list of token ids"),
    "ensure_weight_tying": Honoured(False, is_true, "true or false"),
    "lora_dropout": NoEffect("training only"),
    "fan_in_fan_out": NoEffect("A and B are stored the same way for Linear and Conv1D; the base says which it has"),
    "loftq_config": NoEffect("initialisation; init_lora_weights says whether it was used"),
    "eva_config": NoEffect("initialisation; its ranks are in rank_pattern"),
    "corda_config": NoEffect("initialisation; init_lora_weights says whether it was used"),
    "lora_ga_config": NoEffect("initialisation; init_lora_weights says whether it was used"),
    "megatron_core": NoEffect("only read with megatron_config, which is not served"),
    "qalora_group_size": NoEffect("only read with use_qalora, which is not served"),
}


def lora_scaling(alpha: float, r: int, use_rslora: bool) -> float:
    """What B A x is multiplied by: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
    return alpha / math.sqrt(r) if use_rslora else alpha / r


def plan(config: Mapping[str, Any], shapes: Shapes, base: BaseModel) -> Plan:
    """Check the config and every tensor's name and shape against the base."""
    fields = read_fields(config, FIELDS)
    _check_tying(fields, base)
    ledger, matcher = Ledger(shapes), PatternMatcher()
    new = replaced.plan_replaced(fields, base, ledger)

    def rank_and_scale(name: str) -> tuple[int, float]:
        rank = _by_pattern(fields, "rank_pattern", "r", name, matcher)
        alpha = _by_pattern(fields, "alpha_pattern", "lora_alpha", name, matcher)
        return rank, lora_scaling(alpha, rank, fields["use_rslora"])

    norm_biases = plan_norm_biases(base, new.keys(), ledger) if fields["bias"] == "all" else {}
    parameters = plan_parameters(fields, base, ledger, rank_and_scale)
    present = _present_modules(ledger, base)
    chosen = _chosen_modules(fields, present, base, matcher)
    _check_together(fields, chosen, new.keys(), base)
    _check_targeted_once(chosen, parameters)
    sites, embedding = [], None
    for name in chosen:
        rank, scale = rank_and_scale(name)
        if name == base.embedding:
            embedding = plan_embedding(base, rank, scale, fields["use_dora"], ledger)
        else:
            sites.append(plan_linear(base.linear_sites[name], rank, scale, fields, ledger))
    if fields["bias"] == "all":
        sites += plan_plain_biases(base, {s.site for s in sites}, ledger)
    ledger.close()

    def build(tensors: Mapping[str, Any]) -> Parts:
        others = replaced.build_replaced(new, tensors, base)
        if embedding is not None:
            others[base.embedding] = (build_embedding(embedding, tensors, base),)
        others |= {norm: (NormPart(bias=tensors[name]),) for norm, name in norm_biases.items()}
        linear, experts = build_parameters(parameters, tensors)
        return Parts(linear | {s.site: build_linear(s, tensors, base) for s in sites}, others | experts)

    inferred = fields["target_modules"] is None and not parameters
    warnings = ("target_modules is unset: the sites are those that have tensors",) if inferred else ()
    return Plan(_kind(fields), build, warnings, tuple(fields["alora_invocation_tokens"] or ()))


def kinds(base: BaseModel) -> tuple[str, ...]:
    return ("lora", "rslora", "dora") if base.linear_sites else ()


def _kind(fields: Mapping[str, Any]) -> str:
    if fields["use_dora"]:
        return "dora"
    return "rslora" if fields["use_rslora"] else "lora"


def _by_pattern(fields: Mapping[str, Any], patterns: str, default: str, site: str, matcher: PatternMatcher) -> Any:
    key = matcher.first_key(patterns, fields[patterns], site)
    return fields[default] if key is None else fields[patterns][key]


def _chosen_modules(
    fields: Mapping[str, Any], present: Collection[str], base: BaseModel, matcher: PatternMatcher
) -> list[str]:
    """The targeted modules; none where the config names parameters alone."""
    if fields["target_modules"] is None and fields[lora_experts.FIELD]:
        return []
    return targets.target_sites(fields, present, base, matcher, others=(base.embedding,))


def _check_targeted_once(chosen: Collection[str], parameters: Collection[ParameterPlan]) -> None:
    for plan in parameters:
        if plan.linear in chosen:
            raise AdapterInvalid(
                Reason.INVALID_FIELD,
                f"field target_parameters: expected no module of target_modules, got {plan.site.name}",
            )


def _present_modules(ledger: Ledger, base: BaseModel) -> set[str]:
    """The modules that the LoRA tensors name. Raises where one is not in the base, or cannot be served."""
    present = set()
    for name in ledger.unclaimed():
        module, suffix = _split(name, base)
        if module != base.embedding and module not in base.linear_sites:
            known = module in base.module_names
            raise AdapterInvalid(
                Reason.UNSUPPORTED_SITE if known else Reason.UNKNOWN_SITE,
                f"tensor {name}: expected a linear layer that is served in {base.architecture}, but {module} is "
                + ("another kind of module" if known else "not in this base"),
            )
        if suffix.startswith(".lora_"):
            present.add(module)
    return present


def _split(name: str, base: BaseModel) -> tuple[str, str]:
    """A LoRA tensor's module and what follows it."""
    of_embedding = f"{PREFIX}{base.embedding}" if base.embedding else None
    for suffix in _EMBEDDING_SUFFIXES:
        if name == f"{of_embedding}{suffix}":
            return base.embedding, suffix
    suffix = next((s for s in (*_LINEAR_SUFFIXES, *_EMBEDDING_SUFFIXES) if name.endswith(s)), "")
    if not name.startswith(PREFIX) or not suffix:
        raise AdapterInvalid(
            Reason.UNUSED_TENSOR,
            f"expected {PREFIX}<module>.lora_A.weight and the like, got tensor {name}: not served",
        )
    return name[len(PREFIX) : -len(suffix)], suffix


def _check_together(fields: Mapping[str, Any], chosen: Collection[str], new: Collection[str], base: BaseModel) -> None:
    """Combinations that PEFT cannot run, or that are not served as PEFT would."""
    if fields["lora_bias"] and fields["use_dora"]:
        raise AdapterInvalid(Reason.INVALID_FIELD, "field lora_bias: expected false with use_dora, got True")
    if fields["lora_bias"] and base.embedding in chosen:
        raise AdapterInvalid(Reason.INVALID_FIELD, f"field lora_bias: expected false with {base.embedding}, got True")
    if both := sorted(set(new).intersection(chosen)):
        raise AdapterInvalid(
            Reason.INVALID_FIELD, f"field target_modules: expected no module that is replaced as well, got {both[0]}"
        )
    if fields["bias"] == "all" and any(m in base.linear_sites and base.linear_sites[m].has_bias for m in new):
        raise AdapterInvalid(
            Reason.UNSUPPORTED_FIELD,
            "field bias: expected none or lora_only with a replaced output projection, got all",
        )
    _check_invocation(fields, chosen, base)


def _check_tying(fields: Mapping[str, Any], base: BaseModel) -> None:
    """It says nothing where the base ties nothing, and nothing new of trainable tokens, which are tied without it."""
    if not fields["ensure_weight_tying"] or not base.tied:
        return
    for name in ("target_modules", "modules_to_save"):
        if _names_vocabulary(fields[name]):
            raise AdapterInvalid(
                Reason.UNSUPPORTED_FIELD,
                f"field ensure_weight_tying is not served with {name} of the vocabulary: expected false, got True",
            )


def _names_vocabulary(names: str | list[str] | None) -> bool:
    """PEFT's rule, by the two names it knows."""
    if isinstance(names, str):
        matcher = PatternMatcher()
        return any(matcher.full("target_modules", names, known) for known in _VOCABULARY)
    return any(name.rsplit(".", 1)[-1] in _VOCABULARY for name in names or ())


def _check_invocation(fields: Mapping[str, Any], chosen: Collection[str], base: BaseModel) -> None:
    """Activated LoRA changes nothing before its invocation: no weight that PEFT replaces for all of the prompt."""
    invocation = fields["alora_invocation_tokens"]
    if not invocation:
        return
    if max(invocation) >= base.vocab_size:
        raise AdapterInvalid(
            Reason.INVALID_FIELD,
            f"field alora_invocation_tokens: expected ids below this base's {base.vocab_size}, got {max(invocation)}",
        )
    if fields["task_type"] is None:
        raise AdapterInvalid(
            Reason.UNSUPPORTED_TASK, "field task_type: expected CAUSAL_LM with alora_invocation_tokens, got nothing"
        )
    for name in ("use_dora", "bias", *replaced.FIELDS):
        if fields[name] not in (None, False, "none"):
            raise AdapterInvalid(
                Reason.UNSUPPORTED_FIELD,
                f"field {name} is not served with alora_invocation_tokens: expected nothing, got {show(fields[name])}",
            )
    if base.embedding in chosen:
        raise AdapterInvalid(
            Reason.UNSUPPORTED_SITE,
            f"field target_modules: expected linear layers with alora_invocation_tokens, got {base.embedding}",
        )


METHOD = Method("LORA", plan, kinds)
