"""What stands between a compiled kernel and serving."""

from __future__ import annotations

from peftmux.kernels.compile.measure import Measured
from peftmux.kernels.compile.variant import Variant


def violations(variant: Variant, measured: Measured) -> list[str]:
    """What a variant breaks, in words; empty where it may be served."""
    found = []
    if measured.spilled:
        found.append(f"spills {measured.spilled} bytes a thread")
    if measured.narrow_loads > variant.narrow_loads:
        found.append(f"{measured.narrow_loads} 16-bit global loads, expected at most {variant.narrow_loads}")
    if measured.register_wgmma and variant.num_stages > 1:
        found.append(f"{measured.register_wgmma} pipelined wgmma with an operand in registers")
    if measured.registers > variant.budget.registers:
        found.append(f"{measured.registers} registers a thread, budget {variant.budget.registers}")
    if measured.shared > variant.budget.shared:
        found.append(f"{measured.shared} bytes of shared memory, budget {variant.budget.shared}")
    return found
