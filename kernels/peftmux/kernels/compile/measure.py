"""Compile a variant and read its resources out of the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peftmux.kernels.compile.variant import Variant

_TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_NARROW_LOAD = re.compile(r"\bLDG\.E(?:\.[A-Z0-9]+)*\.U16\b")
_WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.[\w.]+\s*\{[^}]*\}\s*,\s*(\{|\S)")


@dataclass(frozen=True, slots=True)
class Measured:
    """One variant for one architecture."""

    registers: int
    spilled: int
    """Bytes a thread, stack and local memory together."""
    shared: int
    """Bytes a program."""
    narrow_loads: int
    """16-bit loads from global memory."""
    register_wgmma: int
    """Hopper matrix products whose first operand is in registers: ptxas before 13.3 pipelines them wrongly."""


def measure(variant: Variant, arch: int) -> Measured:
    """Compile for sm_`arch`. Errors of the compiler pass through."""
    compiled = triton.compile(
        _source(variant),
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
            "maxnreg": variant.max_registers,
        },
    )
    resources, code = _dump(compiled.asm["cubin"])
    registers, stack, local = (int(n) for n in resources)
    return Measured(
        registers=registers,
        spilled=stack + local,
        shared=compiled.metadata.shared,
        narrow_loads=len(_NARROW_LOAD.findall(code)),
        register_wgmma=sum(operand == "{" for operand in _WGMMA.findall(compiled.asm["ptx"])),
    )


def _source(variant: Variant) -> Any:
    names = variant.kernel.arg_names
    unknown = (set(variant.signature) | set(variant.constants)) ^ set(names)
    if unknown:
        raise ValueError(
            f"{variant.name}: expected a type or a constant for each argument, differs in {sorted(unknown)}"
        )
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    aligned = [
        i
        for i, (name, kind) in enumerate(signature.items())
        if name in variant.divisible or (kind.startswith("*") and name not in variant.unaligned)
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    return ASTSource(variant.kernel, signature, dict(variant.constants), attributes)


def _dump(cubin: bytes) -> tuple[tuple[str, str, str], str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOL), "--dump-resource-usage", "--dump-sass", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _RESOURCES.search(printed)
    if found is None:
        raise RuntimeError(f"expected resources in what cuobjdump prints, got {printed[:200]!r}")
    return (found[1], found[2], found[3]), printed
