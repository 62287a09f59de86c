"""Row-wise operators by Triton. Importing this defines torch operators of the same names under `peftmux::`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from peftmux.kernels.elementwise import triton_kernels as kernels
from peftmux.kernels.elementwise.flat import flat_rows

LARGEST_WIDTH = 65536
_THREAD = 8
"""Elements of a thread, at least: one load of 16 bytes of a 16-bit dtype."""


@torch.library.custom_op("peftmux::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`."""
    _check_norm(x, weight)
    shape, width = x.shape, x.shape[-1]
    rows = x.numel() // width
    x, heads, token, head = _rows(x)
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    if rows:
        block, together, warps = norm_tile(width)
        kernels.rms_norm_kernel[(triton.cdiv(rows, together),)](
            x,
            weight,
            out,
            rows,
            heads,
            token,
            head,
            eps,
            WIDTH=width,
            ROWS=together,
            BLOCK=block,
            num_warps=warps,
        )
    return out


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("peftmux::add_rms_norm", mutates_args=())
def add_rms_norm(x: Tensor, stream: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `reference.add_rms_norm`."""
    _check_norm(x, weight)
    if stream.shape != x.shape or stream.dtype is not x.dtype:
        raise ValueError(f"expected a stream {list(x.shape)} in {x.dtype}, got {list(stream.shape)} in {stream.dtype}")
    width = x.shape[-1]
    first, second = flat_rows(x), flat_rows(stream)
    total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if len(first):
        block, warps = add_norm_tile(width)
        kernels.add_rms_norm_kernel[(len(first),)](
            first,
            second,
            weight,
            total,
            out,
            first.stride(0),
            second.stride(0),
            eps,
            WIDTH=width,
            BLOCK=block,
            num_warps=warps,
        )
    return total, out


@add_rms_norm.register_fake
def _(x: Tensor, stream: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("peftmux::rotate_pair_", mutates_args={"q", "k"})
def rotate_pair_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """As `reference.rotate_` of q: [T, H, D], then of k: [T, G, D]; cos and sin: [T, R]. Heads may stand apart."""
    tokens, turned = cos.shape
    width = min(q.shape[-1], k.shape[-1])
    if sin.shape != cos.shape or turned > width or turned % 2 or not len(q) == len(k) == tokens:
        raise ValueError(
            f"expected cos and sin [{len(q)}, even and at most {width}], got {tuple(cos.shape)}, {tuple(sin.shape)}"
        )
    if q.stride(2) != 1 or k.stride(2) != 1:
        raise ValueError(f"expected heads of neighbouring elements, got strides {q.stride()} and {k.stride()}")
    if tokens:
        half = turned // 2
        heads, block = rotate_tile(half)
        blocks = triton.cdiv(q.shape[1], heads) + triton.cdiv(k.shape[1], heads)
        kernels.rotate_pair_kernel[(tokens, blocks)](
            q,
            k,
            cos.contiguous(),
            sin.contiguous(),
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            Q_HEADS=q.shape[1],
            K_HEADS=k.shape[1],
            HALF=half,
            HEADS=heads,
            BLOCK=block,
            num_warps=4,
        )


@torch.library.custom_op("peftmux::swiglu", mutates_args=())
def swiglu(gate_up: Tensor) -> Tensor:
    """As `reference.swiglu`."""
    return _swiglu(gate_up, gate_up, gate_up, scaled=False)


@torch.library.custom_op("peftmux::scaled_swiglu", mutates_args=())
def scaled_swiglu(gate_up: Tensor, slots: Tensor, scales: Tensor) -> Tensor:
    """swiglu, then the rows of tokens whose slot has a scale multiplied by it, rounded once.

    gate_up: [..., 2 I] of T rows or more, slots: [T] int32, scales: [S, 1] int64, addresses of float32 [I], 0 for none.
    Rows past T are as `swiglu` gives them, and so are those without a scale, to the bit.
    """
    return _swiglu(gate_up, slots, scales, scaled=True)


@swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@scaled_swiglu.register_fake
def _(gate_up: Tensor, slots: Tensor, scales: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `reference.rotate_`."""
    rotate_pair_(x, x[:, :0], cos, sin)
    return x


def norm_tile(width: int) -> tuple[int, int, int]:
    """(columns, rows, warps) of one program of `rms_norm`: several rows where they are short."""
    block = triton.next_power_of_2(width)
    rows = max(1, min(16, 1024 // block))
    return block, rows, _warps(block * rows)


def add_norm_tile(width: int) -> tuple[int, int]:
    """(columns, warps) of one program of `add_rms_norm`."""
    block = triton.next_power_of_2(width)
    return block, _warps(block)


def rotate_tile(half: int) -> tuple[int, int]:
    """(heads, columns) of one program of `rotate_pair_`."""
    return 8, triton.next_power_of_2(half)


def swiglu_tile(width: int) -> int:
    """Columns of one program of `swiglu`."""
    return min(1024, int(triton.next_power_of_2(width)))


def _warps(elements: int) -> int:
    return max(1, min(32, elements // (32 * _THREAD) // 2))


def _swiglu(gate_up: Tensor, slots: Tensor, scales: Tensor, scaled: bool) -> Tensor:
    rows = flat_rows(gate_up)
    width = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    if len(rows) and width:
        block = swiglu_tile(width)
        kernels.swiglu_kernel[(len(rows), triton.cdiv(width, block))](
            rows,
            out,
            slots,
            scales,
            len(slots) if scaled else 0,
            len(scales) if scaled else 0,
            rows.stride(0),
            WIDTH=width,
            BLOCK=block,
            SCALED=scaled,
            num_warps=4,
        )
    return out


def _rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """x: [..., D] -> (x, heads, a token's stride, a head's stride) of [tokens, heads, D]; a view where there is one."""
    outer = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    if x.stride(-1) == 1 and len(outer) <= 2:
        (_, token), (heads, head) = ([(1, 0), (1, 0), *outer] if len(outer) != 1 else [*outer, (1, 0)])[-2:]
        return x, heads, token, head
    rows = flat_rows(x)
    return rows, 1, rows.stride(0), 0


def _check_norm(x: Tensor, weight: Tensor) -> None:
    width = x.shape[-1]
    if weight.shape != (width,):
        raise ValueError(f"expected weight of shape ({width},), got {tuple(weight.shape)}")
    if not 0 < width <= LARGEST_WIDTH:
        raise ValueError(f"expected rows of 1 to {LARGEST_WIDTH} elements, got {width}")
