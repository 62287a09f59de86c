"""The row-wise operators by Triton, in its interpreter, against the definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftmux.kernels.elementwise import choose_elementwise, reference, triton_path
from peftmux.runtime.model.rotary import PairRotation, Rotation
from tests.triton.operators import written

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def close(got: Tensor, expected: Tensor) -> None:
    """Against float64. float32: a few units of rounding; the others: half a unit in the last place of one rounding."""
    bound = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[got.dtype]
    torch.testing.assert_close(got.double(), expected, rtol=bound * 1.01, atol=bound * 1e-2)


def norm64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 60, 64, 130, 768])
def test_rms_norm(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(2, 7, width) * 4).to(dtype), torch.randn(width).to(dtype)
    close(triton_path.rms_norm(x, weight, 1e-5), norm64(x, weight, 1e-5))
    wide = torch.randn(1, 5, 3 * width + 2).to(dtype)
    heads = wide[..., 2:].view(1, 5, 3, width) if width > 1 else wide[..., :3].unsqueeze(-1)
    for view in (heads, heads.transpose(1, 2), heads[0, 0, 0]):
        got = triton_path.rms_norm(view, weight, 1e-5)
        assert got.is_contiguous()
        close(got, norm64(view, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [60, 256])
def test_add_rms_norm_is_the_sum_and_its_norm(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, stream, weight = torch.randn(1, 5, width).to(dtype), torch.randn(1, 5, width).to(dtype), torch.randn(width)
    total, normed = triton_path.add_rms_norm(x, stream, weight, 1e-6)
    assert torch.equal(total, reference.add_rms_norm(x, stream, weight, 1e-6)[0])
    assert torch.equal(total, stream + x)
    close(normed, norm64(total, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("width", "turned", "heads"), [(64, 64, (9, 2)), (80, 32, (3, 1)), (6, 2, (2, 2)), (60, 60, (1, 1))]
)
def test_rotate_pair_turns_both_and_nothing_else(
    width: int, turned: int, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    """Queries and keys are slices of a fused projection with the values behind them."""
    torch.manual_seed(0)
    q_heads, k_heads = heads
    fused = torch.randn(5, (q_heads + k_heads + 1) * width).to(dtype)
    angle = torch.rand(5, turned // 2).repeat(1, 2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    got, expected = fused.clone(), fused.double()
    q, k, _ = got.view(5, -1, width).split([q_heads, k_heads, 1], 1)
    triton_path.rotate_pair_(q, k, cos, sin)
    reference.rotate_(expected.view(5, -1, width)[:, : q_heads + k_heads], cos, sin)
    # Terms of size 4 at most may cancel: bounded by one rounding of their size in float32, then one of the result.
    bound = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=bound, atol=2e-6)
    assert torch.equal(got[:, (q_heads + k_heads) * width :], fused[:, (q_heads + k_heads) * width :])
    alone = fused.clone()
    view = alone.view(5, -1, width)[:, :q_heads]
    assert triton_path.rotate_(view, cos, sin) is view
    assert torch.equal(view, q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 60, 1100])
def test_swiglu(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(2, 2, 2 * width).to(dtype) * 6
    huge = 1e4 if dtype is torch.float16 else 1e30
    gate_up[0, 0, 0], gate_up[0, 1, 0], gate_up[1, 0, 0] = -100.0, -huge, huge
    gate_up[..., width].clamp_(-2, 2)
    gate, up = gate_up.double().chunk(2, -1)
    got = triton_path.swiglu(gate_up)
    close(got, gate * torch.sigmoid(gate) * up)
    assert torch.equal(got, triton_path.swiglu(gate_up)), "repeatable to the bit"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [[0, 0, 0, 0], [2, 2, 2, 2], [1, 2, 3, 7], [0, 2, -1, 1]], ids=str)
def test_scaled_swiglu_multiplies_the_rows_of_its_slots(slots: list[int], dtype: torch.dtype) -> None:
    """Slots 1 and 2 have scales, 3 and 7 have none; one row more than there are tokens; what is not read is NaN."""
    torch.manual_seed(0)
    width = 60
    gate_up = torch.randn(5, 2 * width).to(dtype)
    pool = torch.full((3, 64), float("nan"))
    pool[:2, :width] = torch.randn(2, width) * 3
    table = torch.tensor([[pool[2].data_ptr()], [pool[0].data_ptr()], [pool[1].data_ptr()], *[[0]] * 5])
    got = triton_path.scaled_swiglu(gate_up, torch.tensor(slots, dtype=torch.int32), table)
    gate, up = gate_up.double().chunk(2, -1)
    expected = gate * torch.sigmoid(gate) * up
    plain = triton_path.swiglu(gate_up)
    for row, slot in enumerate([*slots, 0]):
        if slot in (1, 2):
            expected[row] *= pool[slot - 1, :width].double()
        else:
            assert torch.equal(got[row], plain[row])
    close(got, expected)


def test_chosen_on_a_gpu_and_nowhere_else() -> None:
    gpu = choose_elementwise("cuda", torch.bfloat16)
    assert (gpu.name, gpu.rms_norm, gpu.swiglu) == ("triton", triton_path.rms_norm, triton_path.swiglu)
    assert choose_elementwise("cpu", torch.bfloat16).name != "triton"


@pytest.mark.parametrize("heads_last", [False, True])
def test_the_model_s_rotation_in_one_launch(heads_last: bool) -> None:
    """As the two of it; one head seen as many turns once."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 6, 5, 16), torch.randn(1, 1, 5, 16).expand(1, 3, 5, 16)
    if heads_last:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    angle = torch.rand(1, 5, 8).repeat(1, 1, 2)
    arguments = (angle.cos(), angle.sin(), 2 if heads_last else 1)
    one = PairRotation(choose_elementwise("cuda", torch.float32))(q.clone(), k, *arguments)
    two = Rotation(choose_elementwise("cpu", torch.float32))(q.clone(), k, *arguments)
    for got, expected in zip(one, two, strict=True):
        torch.testing.assert_close(got, expected)


def test_empty_batches_and_wrong_shapes() -> None:
    assert triton_path.rms_norm(torch.zeros(0, 8), torch.ones(8), 1e-6).shape == (0, 8)
    assert triton_path.swiglu(torch.zeros(0, 8)).shape == (0, 4)
    x = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match=r"expected weight of shape \(8,\), got \(7,\)"):
        triton_path.rms_norm(x, torch.zeros(7), 1e-6)
    with pytest.raises(ValueError, match=r"even and at most 8\], got \(2, 10\)"):
        triton_path.rotate_(x, torch.zeros(2, 10), torch.zeros(2, 10))
    with pytest.raises(ValueError, match="heads of neighbouring elements"):
        triton_path.rotate_(x.transpose(1, 2), torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"expected a stream \[2, 3, 8\]"):
        triton_path.add_rms_norm(x, x[:1], torch.zeros(8), 1e-6)


def test_operators_can_be_traced_without_running() -> None:
    """A graph compiler sees shapes and what is written."""
    x = torch.randn(2, 4, 16)
    rotation = (x, torch.randn(2, 1, 16), torch.randn(2, 8), torch.randn(2, 8))
    scale = torch.randn(8)
    slots, table = torch.ones(2, dtype=torch.int32), torch.tensor([[0], [scale.data_ptr()]])
    for op, args, changed in [
        (triton_path.rms_norm, (x, torch.ones(16), 1e-6), set()),
        (triton_path.add_rms_norm, (x, x.clone(), torch.ones(16), 1e-6), set()),
        (triton_path.swiglu, (x,), set()),
        (triton_path.scaled_swiglu, (x[:, 0], slots, table), set()),
        (triton_path.rotate_pair_, rotation, {"q", "k"}),
    ]:
        assert written(op, args) == changed
