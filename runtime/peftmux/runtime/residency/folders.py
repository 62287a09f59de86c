"""The adapter folders under the adapter root, and what tells that one of them has changed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from peftmux.adapters.files import CHECKPOINT_FILE, CONFIG_FILE

Signature = tuple[tuple[str, int, int, int], ...]
"""(name, inode, bytes, modification time in ns) of every entry, by name: equal where nothing was written or renamed."""
_TENSOR_SUFFIXES = (".safetensors", ".bin", ".pt")
_OF_A_RUN = frozenset(
    [CHECKPOINT_FILE, "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "training_args.bin"]
)
"""What a training run keeps in its checkpoints, which may stand beside adapters."""


def scan(root: str | Path) -> Mapping[str, Signature]:
    """Every adapter folder by its path under the root, at most two deep, as adapters' names are.

    A folder is one if it holds a config, or tensors that are no training run's own. Names that begin with a dot are
    being written, or are a volume's own. What vanishes while it is looked at is left out. OSError where the root itself
    cannot be read.
    """
    found: dict[str, Signature] = {}
    for entry in _folders(root):
        signature = _signature(entry.path)
        if _holds_adapter(signature):
            found[entry.name] = signature
            continue
        try:
            inner = list(_folders(entry.path))
        except OSError:
            continue
        for below in inner:
            if _holds_adapter(signature := _signature(below.path)):
                found[f"{entry.name}/{below.name}"] = signature
    return found


def _folders(path: str | Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        yield from (entry for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def _signature(folder: str) -> Signature:
    try:
        with os.scandir(folder) as entries:
            stats = [(entry.name, entry.stat()) for entry in entries]
    except OSError:
        return ()
    return tuple(sorted((name, status.st_ino, status.st_size, status.st_mtime_ns) for name, status in stats))


def _holds_adapter(signature: Signature) -> bool:
    names = [name for name, *_ in signature if name not in _OF_A_RUN]
    return any(name == CONFIG_FILE or name.endswith(_TENSOR_SUFFIXES) for name in names)
