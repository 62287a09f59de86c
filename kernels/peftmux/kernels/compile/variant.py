"""One kernel with the types and constants of one launch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Budget:
    """What one program may take of a streaming multiprocessor."""

    registers: int = 255
    """A thread; more than 255 do not exist, and what does not fit spills."""
    shared: int = 99 * 1024
    """Bytes; 99 KiB fit on every device from sm_80 on (sm_86 and sm_89 have the least)."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What `kernel[grid](...)` would compile: an operator lists one for each launch that its path can make.

    signature: triton's type of each argument that is not a constant, in any order: "*bf16", "*fp32", "*i32", "i32",
    "i64". Pointers count as aligned to 16 bytes, as tensors' storages are; `divisible` names the integers that are
    multiples of 16 (triton specialises on it at launch), `unaligned` the pointers that may not be aligned.
    """

    name: str
    kernel: Any
    """A function under triton.jit."""
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None
    """triton's `maxnreg`: without it ptxas may spill to fit more programs."""
    divisible: tuple[str, ...] = ()
    unaligned: tuple[str, ...] = ()
    narrow_loads: int = 0
    """16-bit global loads that the kernel's meaning asks for; any other is a load that was not vectorised."""
    budget: Budget = Budget()
