"""An adapter folder, written so that no reader ever sees half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from peftmux.adapters.aside import INSIDE, folder_aside, remove_leftovers
from peftmux.adapters.digest import adapter_digest
from peftmux.adapters.errors import AdapterError
from peftmux.adapters.files import CONFIG_FILE, TENSOR_FILE, parse_config
from peftmux.adapters.hub import CONFIGS, TENSORS, fused_names
from peftmux.adapters.hub_fields import FUSION_CONFIG, INTERFACE
from peftmux.adapters.swap import NEW, swap_files, sync_folder


def write_adapter(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    extra_files: Mapping[str, str | bytes] | None = None,
) -> str:
    """Write PEFT's two files (and `extra_files`, by plain name) and return the content's digest.

    A new `folder` appears in one rename. One that is there stays, which may be a mount or the current directory, and
    keeps the files that are no adapter's: those of the old one go, with the members that a fusion names. A reader finds
    the old adapter, none, or the new one; where the process is killed, whoever writes there next, or asks
    `remove_leftovers`, first puts the old or the new one in place.
    """
    plain = {name: _plain(value) for name, value in config.items()}
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    files: dict[str, bytes] = {name: _bytes(name, data) for name, data in (extra_files or {}).items()}
    files[TENSOR_FILE] = save(stored, metadata={"format": "pt"})
    files[CONFIG_FILE] = json.dumps(dict(sorted(plain.items())), indent=2, allow_nan=False).encode()
    write_files(folder, files)
    return adapter_digest(plain, stored)


_ADAPTERS_OWN = (*CONFIGS, INTERFACE, *TENSORS, TENSOR_FILE)
"""Of the adapter that is replaced none may stay."""


def write_files(folder: str | Path, files: Mapping[str, bytes]) -> None:
    """Write a folder's files, by name or by `sub-folder/name`; the folder as in `write_adapter`."""
    folder = Path(folder).resolve()  # a link stays, and what it leads to is written
    remove_leftovers(folder)
    stays = folder.is_dir()
    with folder_aside(folder / INSIDE if stays else folder) as aside:
        _write(aside / NEW, files)
        if stays:
            swap_files(aside, _old_files(folder, files))
        else:
            os.rename(aside / NEW, folder)
    sync_folder(folder.parent)


def _write(new: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        _write_durably(new / name, data)
    for written in {new, *((new / name).parent for name in files)}:
        sync_folder(written)


def _old_files(folder: Path, new: Iterable[str]) -> list[str]:
    """An adapter's files in the folder, in its members' where it is a fusion, and where others will be written."""
    places = {"", "fusion/", *(f"{name}/" for name in _members(folder))}
    places |= {"".join(name.rpartition("/")[:2]) for name in new}
    return [place + name for place in places for name in _ADAPTERS_OWN if (folder / place / name).is_file()]


def _members(folder: Path) -> Iterator[str]:
    """Sub-folders that are a fusion's own. What a link leads to is not."""
    for place in (folder, folder / "fusion"):
        try:
            names = fused_names(parse_config((place / FUSION_CONFIG).read_bytes(), FUSION_CONFIG))
        except (OSError, AdapterError):
            continue
        yield from (name for name in names if not (folder / name).is_symlink())


def _write_durably(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _plain(value: Any) -> Any:
    """Sets become sorted lists: what PEFT holds as a set has no order of its own."""
    return sorted(value) if isinstance(value, set | frozenset) else value


def _bytes(name: str, data: str | bytes) -> bytes:
    if Path(name).name != name or name in (CONFIG_FILE, TENSOR_FILE, "", ".", ".."):
        raise ValueError(f"extra file: expected a plain file name other than the adapter's own, got {name!r}")
    return data.encode() if isinstance(data, str) else data
