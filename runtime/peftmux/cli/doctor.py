"""`peftmux doctor`: what this machine can do, and why not."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("peftmux", "torch", "transformers", "triton", "safetensors", "grpcio", "protobuf")
_EXTRAS = {"accelerate": "peftmux train"}


def main(argv: Sequence[str]) -> int:
    argparse.ArgumentParser(prog="peftmux doctor", description="What this machine can do, and why not.").parse_args(
        argv
    )
    for name, value in report():
        print(f"{name:<18}{value}")
    return 0


def report() -> Iterator[tuple[str, str]]:
    """(what, finding) line by line."""
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in _PACKAGES:
        yield package, _version(package) or "not installed"
    for package, user in _EXTRAS.items():
        yield package, _version(package) or f"not installed: {user} needs it (pip install 'peftmux[train]')"
    yield from _cpu()
    yield from _cuda()
    yield from _native()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> Iterator[tuple[str, str]]:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield "cpu", f"{usable} usable cores, {torch.backends.cpu.get_cpu_capability()}, {memory:.1f} GiB of memory"
    yield "torch threads", f"{torch.get_num_threads()} (OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')})"


def _cuda() -> Iterator[tuple[str, str]]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        yield "cuda", "no device found" if built else "this torch is built without CUDA: --device cuda cannot be used"
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        yield f"cuda {index}", f"{device.name}, compute {device.major}.{device.minor}, {memory:.1f} GiB"


def _native() -> Iterator[tuple[str, str]]:
    from peftmux.kernels import native

    yield "native kernels", str(native.status())
