"""An adapter's files in a folder that stays, replaced by others so that no end of the process loses both.

The new files are complete in a folder of the same one, `new`, before anything is touched; the old ones are moved into
`taken` beside it; `new` is renamed to `whole`; and its files are moved to where they belong. Whoever finds `whole` goes
on with the last step, whoever finds `taken` alone moves back what is in it: `settle`. The folder itself, which may be a
mount or the current directory, is never renamed, and its other files are not touched.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from peftmux.adapters.files import CONFIG_FILE
from peftmux.adapters.hub_fields import FUSION_CONFIG, HEAD_CONFIG

NEW = "new"
_TAKEN, _WHOLE = "taken", "whole"
_LAST = ("", HEAD_CONFIG, CONFIG_FILE, FUSION_CONFIG)
"""What says how a folder is read comes last, and goes first: what is read first by a reader at the very end."""


def swap_files(aside: Path, old: Collection[str]) -> None:
    """Replace `old`, files of the folder that `aside` lies in, by those of `aside`'s folder `new`. A reader meanwhile
    finds the old adapter, none, or the new one. Names: relative, with "/". Sub-folders that are left empty go."""
    folder, new = aside.parent, _files(aside / NEW)
    for name in new:
        if (folder / name).is_dir():
            raise IsADirectoryError(f"expected a file or nothing at {folder / name}, found a folder")
    for name in reversed(_in_order({*old, *new})):
        with suppress(FileNotFoundError):
            _move(folder / name, aside / _TAKEN / name)
        if "/" in name:
            with suppress(OSError):  # others are in it
                (folder / name).parent.rmdir()
    sync_folder(folder)
    os.rename(aside / NEW, aside / _WHOLE)
    sync_folder(aside)
    settle(aside)


def settle(aside: Path) -> None:
    """End what a `swap_files` was cut off in: the folder has the new files if it had got so far, else the old ones."""
    left = next((aside / name for name in (_WHOLE, _TAKEN) if (aside / name).is_dir()), None)
    if left is None:
        return
    names = _in_order(_files(left))
    for name in names:
        _move(left / name, aside.parent / name)
    for folder in {aside.parent, *((aside.parent / name).parent for name in names)}:
        sync_folder(folder)
    if left.name == _WHOLE and (aside / _TAKEN).is_dir():
        shutil.rmtree(aside / _TAKEN)  # before `whole`: alone it would be moved back


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _move(source: Path, target: Path) -> None:
    if os.path.lexists(source):
        target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


def _files(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return [path.relative_to(folder).as_posix() for path in found]


def _in_order(names: Iterable[str]) -> list[str]:
    def rank(name: str) -> tuple[int, str]:
        last = name.rpartition("/")[2]
        return _LAST.index(last) if last in _LAST else 0, name

    return sorted(names, key=rank)
