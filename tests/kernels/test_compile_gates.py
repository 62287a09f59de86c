"""The gates see what they are there to see, on kernels made for it. Needs triton's compiler, no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

triton = pytest.importorskip("triton", reason="needs triton, which has builds for Linux on x86_64 alone")
import triton.language as tl  # noqa: E402

from peftmux.kernels.compile import Budget, Variant  # noqa: E402
from peftmux.kernels.compile.gates import violations  # noqa: E402
from peftmux.kernels.compile.measure import Measured, measure  # noqa: E402


@triton.jit
def copy(source, target, count, WIDTH: tl.constexpr):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)


TYPES = {"source": "*bf16", "target": "*bf16", "count": "i32"}
VECTORISED = Variant("copy", copy, TYPES, {"WIDTH": 1024}, divisible=("count",))
GOOD = Measured(registers=32, spilled=0, shared=0, narrow_loads=0, register_wgmma=0)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_vectorised_kernel_passes(arch: int) -> None:
    measured = measure(VECTORISED, arch)
    assert 0 < measured.registers < 64
    assert violations(VECTORISED, measured) == []


def test_narrow_loads_are_seen() -> None:
    """The mask's end is not known to be a multiple of anything: each element is loaded alone."""
    narrow = replace(VECTORISED, divisible=())
    assert "16-bit global loads" in violations(narrow, measure(narrow, 90))[0]


@pytest.mark.parametrize(
    ("worse", "words"),
    [
        ({"spilled": 8}, "spills 8"),
        ({"narrow_loads": 1}, "16-bit"),
        ({"register_wgmma": 1}, "in registers"),
        ({"registers": 65}, "65 registers"),
        ({"shared": 100_000}, "shared memory"),
    ],
)
def test_each_gate(worse: dict[str, int], words: str) -> None:
    variant = replace(VECTORISED, budget=Budget(registers=64, shared=64 * 1024))
    assert violations(variant, GOOD) == []
    (found,) = violations(variant, replace(GOOD, **worse))
    assert words in found


def test_unpipelined_products_may_read_registers() -> None:
    assert violations(replace(VECTORISED, num_stages=1), replace(GOOD, register_wgmma=1)) == []


def test_every_argument_has_a_type_or_a_value() -> None:
    with pytest.raises(ValueError, match="WIDTH"):
        measure(replace(VECTORISED, constants={}), 90)
