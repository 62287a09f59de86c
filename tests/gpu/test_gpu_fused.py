"""The smaller operators on a CUDA device, against their definitions in float64, eagerly and in a captured graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftmux.kernels.elementwise import choose_elementwise

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def close(got: Tensor, expected: Tensor) -> None:
    """float32: a few units of rounding; the others: one rounding."""
    bound = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[got.dtype]
    torch.testing.assert_close(got.double(), expected, rtol=bound * 1.02, atol=max(bound * 2e-2, 2e-6))


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(dtype: torch.dtype) -> None:
    path = choose_elementwise("cuda", dtype)
    assert path.name == "triton"
    for shape in ((1, 63, 4096), (1, 5, 32, 128), (3, 60), (1, 2, 14336)):
        x, weight = normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype, seed=1)
        wide = x.double()
        expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        close(path.rms_norm(x, weight, 1e-5), expected)
        gate, up = wide.chunk(2, -1)
        close(path.swiglu(x), gate * torch.sigmoid(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_of_a_fused_projection(dtype: torch.dtype) -> None:
    path = choose_elementwise("cuda", dtype)
    assert path.rotate_pair_ is not None
    fused = normal(63, 48 * 128, dtype=dtype)
    angle = normal(63, 64, seed=1).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    before = fused.double().view(63, 48, 128)
    q, k, _ = fused.view(63, 48, 128).split([32, 8, 8], 1)
    path.rotate_pair_(q, k, cos, sin)
    first, second = before.chunk(2, -1)
    turned = before * cos.double()[:, None] + torch.cat([-second, first], -1) * sin.double()[:, None]
    close(fused.view(63, 48, 128), torch.cat([turned[:, :40], before[:, 40:]], 1))
