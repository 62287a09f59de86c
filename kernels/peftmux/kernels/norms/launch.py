"""Which form of replaced norm parameters a site runs: decided once, when it is made."""

from __future__ import annotations

from torch import Tensor, nn

from peftmux.kernels.norms.formula import formula_of
from peftmux.kernels.norms.site import NormSite
from peftmux.kernels.triton_here import triton_here


def norm_site(norm: nn.Module, token_dim: int) -> NormSite:
    """token_dim: of the norm's input, along which the tokens lie."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    if triton_here(weight.device) and (formula := formula_of(norm)):
        from peftmux.kernels.norms.triton_path import TritonNormSite

        return TritonNormSite(norm, token_dim, formula)
    return NormSite(norm, token_dim)
