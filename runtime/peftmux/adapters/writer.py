"""An adapter folder, written so that no reader ever sees half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from peftmux.adapters.aside import folder_aside
from peftmux.adapters.digest import adapter_digest
from peftmux.adapters.files import CONFIG_FILE, TENSOR_FILE
from peftmux.adapters.hub import CONFIGS, TENSORS
from peftmux.adapters.hub_fields import INTERFACE


def write_adapter(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    extra_files: Mapping[str, str | bytes] | None = None,
) -> str:
    """Write PEFT's two files (and `extra_files`, by plain name) and return the content's digest.

    A new `folder` appears in one rename. One that is there stays, which may be a mount or the current directory, and
    keeps the files that are no adapter's; its config is taken away first and put back last, so a reader finds the old
    adapter, none, or the new one.
    """
    plain = {name: _plain(value) for name, value in config.items()}
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    files: dict[str, bytes] = {name: _bytes(name, data) for name, data in (extra_files or {}).items()}
    files[TENSOR_FILE] = save(stored, metadata={"format": "pt"})
    files[CONFIG_FILE] = json.dumps(dict(sorted(plain.items())), indent=2, allow_nan=False).encode()
    write_files(folder, files)
    return adapter_digest(plain, stored)


_OLD = (*CONFIGS, INTERFACE, *TENSORS, TENSOR_FILE)
"""Of the adapter that is replaced none may stay, in the order in which they go: first what says how it is read."""


def write_files(folder: str | Path, files: Mapping[str, bytes]) -> None:
    """Write a folder's files, by name or by `sub-folder/name`, configs last; the folder as in `write_adapter`."""
    folder = Path(folder).resolve()  # a link stays, and what it leads to is written
    with folder_aside(folder) as aside:
        for name, data in files.items():
            (aside / name).parent.mkdir(exist_ok=True)
            _write_durably(aside / name, data)
        for written in {(aside / name).parent for name in files}:
            _sync_folder(written)
        _publish(aside, folder, sorted(files, key=lambda name: name.rpartition("/")[2] in CONFIGS))


def _publish(aside: Path, folder: Path, names: list[str]) -> None:
    if not folder.is_dir():
        os.rename(aside, folder)
    else:
        inside = {folder, folder / "fusion", *((folder / name).parent for name in names)}
        for place in inside:
            for name in _OLD:
                (place / name).unlink(missing_ok=True)
        _sync_folder(folder)
        for name in names:  # the configs are the last of them
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(aside / name, folder / name)
        _sync_folder(folder)
    _sync_folder(folder.parent)


def _write_durably(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _plain(value: Any) -> Any:
    """Sets become sorted lists: what PEFT holds as a set has no order of its own."""
    return sorted(value) if isinstance(value, set | frozenset) else value


def _bytes(name: str, data: str | bytes) -> bytes:
    if Path(name).name != name or name in (CONFIG_FILE, TENSOR_FILE, "", ".", ".."):
        raise ValueError(f"extra file: expected a plain file name other than the adapter's own, got {name!r}")
    return data.encode() if isinstance(data, str) else data
