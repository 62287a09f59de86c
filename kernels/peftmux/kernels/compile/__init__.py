"""Ahead-of-time compilation of every Triton kernel that serving can launch, and what the machine code must not contain.

`python -m peftmux.kernels.compile` needs triton and no GPU.
"""

from peftmux.kernels.compile.variant import Budget, Variant

__all__ = ["Budget", "Variant"]
