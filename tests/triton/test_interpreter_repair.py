"""The repaired interpreter against torch: the ground that every other test here stands on."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def product(a, b, c, SIZE: tl.constexpr, WIDEN: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x, y = tl.load(a + at), tl.load(b + at)
    out = tl.dot(x, y) if WIDEN else x + y
    tl.store(c + at, out.to(c.dtype.element_ty))


def test_products_and_rounding_of_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator).bfloat16() for _ in range(2))
    out = torch.empty(16, 16, dtype=torch.bfloat16)
    product[(1,)](a, b, out, 16, True)
    expected = a.float() @ b.float()
    assert torch.equal(out, expected.bfloat16()), "one rounding, to nearest"


def test_arithmetic_on_bits_is_refused() -> None:
    a = torch.ones(16, 16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="widen to float32"):
        product[(1,)](a, a, a.clone(), 16, False)
