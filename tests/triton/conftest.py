"""Triton's interpreter, repaired. Collected only under TRITON_INTERPRET=1, which must be set before triton is imported:
`make kernels` runs this folder in a process of its own.

What the interpreter gets wrong (numpy has no bfloat16, so it holds the raw bits): products of bfloat16 operands,
rounding of float32 to bfloat16 (it truncates), arithmetic on bfloat16 values (it would
compute on the bits: refused here, since a kernel must widen first).
"""

from __future__ import annotations

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    from tests.triton import interpreter

    interpreter.repair()


@pytest.fixture(autouse=True)
def _interpreted() -> None:
    """A kernel that was decorated before the variable was set would need a GPU."""
    import triton

    assert triton.knobs.runtime.interpret, "expected TRITON_INTERPRET=1 before triton is imported"
