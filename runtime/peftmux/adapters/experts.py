"""Stacked mixture-of-experts weights as transformers 5 keeps them: what a module must have to count as such."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peftmux.adapters.base import ParameterSite


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One module's experts. Weights are [E, out, in], or [E, in, out] where `transposed`; biases [E, out]."""

    up: ParameterSite
    """Named by the parameter: gate_up_proj, or up_proj where the experts have no gate."""
    down: ParameterSite
    up_weight: Tensor
    down_weight: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    transposed: bool


def expert_weights(module: nn.Module, path: str = "") -> ExpertWeights | None:
    """None unless the module has the form of transformers' `use_experts_implementation`, without its own norm."""
    form: Any = module
    parameters = dict(module.named_parameters(recurse=False))
    transposed, gated = (getattr(module, name, None) for name in ("is_transposed", "has_gate"))
    if not isinstance(transposed, bool) or not isinstance(gated, bool) or getattr(form, "has_post_expert_norm", False):
        return None
    name = "gate_up_proj" if gated else "up_proj"
    up, down = parameters.get(name), parameters.get("down_proj")
    if up is None or down is None or up.dim() != 3 or down.dim() != 3 or not up.is_floating_point():
        return None
    return ExpertWeights(
        _site(f"{path}.{name}", up, transposed),
        _site(f"{path}.down_proj", down, transposed),
        up.detach(),
        down.detach(),
        _bias(parameters.get(f"{name}_bias")),
        _bias(parameters.get("down_proj_bias")),
        transposed,
    )


def is_router(module: nn.Module) -> bool:
    """A module of no kind that has a site already, with one matrix that chooses among experts by its rows."""
    weight = module._parameters.get("weight")
    named = type(module).__name__.endswith(("Router", "Gate"))
    return named and isinstance(weight, nn.Parameter) and weight.dim() == 2 and not isinstance(module, nn.Linear)


def router_site(path: str, module: nn.Module) -> ParameterSite:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return ParameterSite(f"{path}.weight", 0, weight.shape[1], weight.shape[0])


def parameter_sites(module: nn.Module) -> dict[str, ParameterSite]:
    """Every stacked expert weight and router weight of a model, by the parameter's path."""
    found: dict[str, ParameterSite] = {}
    for path, child in module.named_modules():
        weights = expert_weights(child, path)
        if weights is not None:
            found |= {site.name: site for site in (weights.up, weights.down)}
        elif is_router(child):
            site = router_site(path, child)
            found[site.name] = site
    return found


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """The paths of all parameters, module by module: PEFT's own order."""
    return tuple(
        f"{path}.{name}" for path, child in module.named_modules() for name, _ in child.named_parameters(recurse=False)
    )


def _site(name: str, weight: Tensor, transposed: bool) -> ParameterSite:
    experts, a, b = weight.shape
    return ParameterSite(name, experts, a if transposed else b, b if transposed else a)


def _bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()
