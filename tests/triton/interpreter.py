"""Makes triton's interpreter right where it is silently wrong about bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder: Any = interpreter.InterpreterBuilder
_ARITHMETIC = (
    *("create_fadd", "create_fsub", "create_fmul", "create_fdiv", "create_frem", "create_fneg", "create_fma"),
    *(
        "create_exp",
        "create_exp2",
        "create_log",
        "create_log2",
        "create_sqrt",
        "create_rsqrt",
        "create_sin",
        "create_cos",
    ),
    *("create_fabs", "create_minnumf", "create_maxnumf", "create_minimumf", "create_maximumf", "create_clampf"),
    *(f"create_fcmp{order}{relation}" for order in "OU" for relation in ("LT", "GT", "LE", "GE", "EQ", "NE")),
)


def repair() -> None:
    """Once a process."""
    if getattr(Builder, "repaired", False):
        return
    Builder.repaired = True
    _products()
    _rounding()
    for name in _ARITHMETIC:
        if hasattr(Builder, name):
            setattr(Builder, name, _refusing(name, getattr(Builder, name)))


def _is_bf16(handle: Any) -> bool:
    return isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar == tl.bfloat16


def widened(handle: Any) -> np.ndarray[Any, Any]:
    """float32 values of a handle that may hold the bits of bfloat16."""
    data: np.ndarray[Any, Any] = handle.data
    return (data.astype(np.uint32) << 16).view(np.float32) if _is_bf16(handle) else data


def rounded(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 -> the bits of bfloat16, to nearest, ties to even, NaN to a quiet NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    kept: np.ndarray[Any, Any] = np.where(np.isnan(values), np.uint16(0x7FC0), nearest)
    return kept


def _products() -> None:
    stock = Builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if not (_is_bf16(a) or _is_bf16(b)):
            return stock(self, a, b, d, *rest)
        if _is_bf16(d):
            raise TypeError("expected a float32 accumulator, got bfloat16")
        product = np.matmul(widened(a), widened(b), dtype=np.float32)
        return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    Builder.create_dot = create_dot


def _rounding() -> None:
    stock = Builder.cast_impl

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            return interpreter.TensorHandle(rounded(source.data), kind.scalar)
        return stock(self, source, kind)

    Builder.cast_impl = cast_impl
    Builder.create_fp_trunc = lambda self, source, kind: self.cast_impl(source, kind)


def _refusing(name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: Any, *args: Any, **options: Any) -> Any:
        if any(_is_bf16(handle) for handle in args):
            raise TypeError(f"{name} on bfloat16: expected the kernel to widen to float32 first")
        return stock(self, *args, **options)

    return guarded
