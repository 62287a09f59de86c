"""Row-wise operators: every form against the definition, and the definitions against transformers' own layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from peftmux.kernels.elementwise import choose_elementwise, rms_norm, rotate_, swiglu

DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [1, 6, 16, 60, 64, 130, 768]


def close(got: Tensor, expected: Tensor, path: str) -> None:
    """float32: a few units of rounding. bfloat16, 8 significant bits: one rounding differs by a unit in the last place
    at most, 2^-7; torch rounds intermediate results too, up to three of the result's size."""
    bound = 1e-6 if got.dtype is torch.float32 else 2**-7 if path == "native" else 2**-5
    torch.testing.assert_close(got.float(), expected.float(), rtol=bound, atol=bound * 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(path: str, width: int, dtype: torch.dtype) -> None:
    chosen = choose_elementwise("cpu", dtype)
    assert chosen.name == path
    torch.manual_seed(0)
    x, weight = torch.randn(3, 7, width).to(dtype) * 4, torch.randn(width).to(dtype)
    close(chosen.rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5), path)
    sliced = torch.randn(9, width + 5).to(dtype)[:, :width]
    close(chosen.rms_norm(sliced, weight, 1e-5), rms_norm(sliced, weight, 1e-5), path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu(path: str, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = (torch.randn(2, 5, 2 * width) * 6).to(dtype)
    gate_up[0, 0, 0], gate_up[0, 1, 0], gate_up[0, 2, 0] = -100.0, -1e30, 1e30
    gate_up[..., width].clamp_(-2, 2)
    chosen = choose_elementwise("cpu", dtype)
    assert chosen.name == path
    close(chosen.swiglu(gate_up), swiglu(gate_up), path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "turned"), [(64, 64), (80, 32), (6, 2), (60, 60), (128, 128)])
def test_rotate(path: str, width: int, turned: int, dtype: torch.dtype) -> None:
    """On the queries' slice of a fused projection, which must not touch what stands beside it."""
    torch.manual_seed(0)
    fused = torch.randn(5, 4 * width).to(dtype)
    angle = torch.rand(5, turned // 2).repeat(1, 2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    expected = fused.clone()
    rotate_(expected[:, : 3 * width].view(5, 3, width), cos, sin)
    got = fused.clone()
    view = got[:, : 3 * width].view(5, 3, width)
    chosen = choose_elementwise("cpu", dtype)
    assert chosen.name == path
    assert chosen.rotate_(view, cos, sin) is view
    # torch's rounded terms may cancel: bounded by the operands' size, which is about 4.
    bound = 1e-6 if dtype is torch.float32 else 2**-7 if path == "native" else 2**-5
    torch.testing.assert_close(got.float(), expected.float(), rtol=bound, atol=bound)
    heads = got[:, : 3 * width].view(5, 3, width)
    assert torch.equal(heads[..., turned:], fused[:, : 3 * width].view(5, 3, width)[..., turned:])
    assert torch.equal(got[:, 3 * width :], fused[:, 3 * width :])


def test_the_definitions_are_those_of_transformers() -> None:
    torch.manual_seed(0)
    norm, x = LlamaRMSNorm(48, eps=1e-6), torch.randn(5, 48)
    norm.weight.data.normal_()
    torch.testing.assert_close(rms_norm(x, norm.weight.data, 1e-6), norm(x).detach())
    q, k = torch.randn(1, 3, 5, 16), torch.randn(1, 1, 5, 16)
    angle = torch.rand(1, 5, 8).repeat(1, 1, 2)
    for x, expected in zip((q, k), apply_rotary_pos_emb(q, k, angle.cos(), angle.sin()), strict=True):
        turned = rotate_(x[0].transpose(0, 1).clone(), angle.cos()[0], angle.sin()[0])
        torch.testing.assert_close(turned.transpose(0, 1)[None], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_rows_do_not_depend_on_their_batch(native_path: str, dtype: torch.dtype) -> None:
    """Nor on whether other threads helped: the whole is large enough for them."""
    chosen = choose_elementwise("cpu", dtype)
    x, weight = torch.randn(300, 514).to(dtype), torch.randn(514).to(dtype)
    normed, product = chosen.rms_norm(x, weight, 1e-6), chosen.swiglu(x)
    for row in range(0, 300, 37):
        assert torch.equal(chosen.rms_norm(x[row : row + 1], weight, 1e-6)[0], normed[row])
        assert torch.equal(chosen.swiglu(x[row : row + 1])[0], product[row])


def test_native_operators_say_what_is_wrong(native_path: str) -> None:
    chosen = choose_elementwise("cpu", torch.float32)
    x = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match=r"expected torch\.float32, got torch\.bfloat16"):
        chosen.rms_norm(x, torch.zeros(8, dtype=torch.bfloat16), 1e-6)
    with pytest.raises(ValueError, match=r"expected weight of shape \(8,\), got \(7,\)"):
        chosen.rms_norm(x, torch.zeros(7), 1e-6)
    with pytest.raises(ValueError, match=r"even and at most 8\], got \(2, 10\)"):
        chosen.rotate_(x, torch.zeros(2, 10), torch.zeros(2, 10))
    with pytest.raises(ValueError, match="heads of neighbouring elements"):
        chosen.rotate_(x.transpose(1, 2), torch.zeros(2, 2), torch.zeros(2, 2))
