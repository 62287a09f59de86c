"""Folders that are written beside the place they are meant for, under names that begin with a dot.

A process holds a lock on each of its own, which ends with it: a folder that can be locked was left by one that was
killed. Where folders cannot be locked (some network file systems) what a killed process left stays.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.swap import settle

INSIDE = "adapter"
"""For what stands in a folder that stays: what is written there lies beside this name, in the folder itself."""
_TRIES = 10
_NAME = re.compile(r"\.(.+)\.[0-9a-f]{12}\.partial")


def check_new(folder: Path) -> None:
    """AdapterInvalid unless `folder` is not there, or is one and empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AdapterInvalid(Reason.INVALID_FIELD, f"expected a new or empty folder to write to, got {folder}")


@contextmanager
def folder_aside(target: Path) -> Iterator[Path]:
    """A new folder in `target`'s, of this process alone, which is renamed by the caller or gone at the end.

    What killed processes left beside the same target is removed first. `target`'s folder is made where it is not there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    path, lock = _make(target)
    try:
        yield path
    finally:
        _remove(path)
        os.close(lock)


def put_in_place(aside: Path, target: Path) -> None:
    """Rename `aside`'s folder `new` to `target`. What was there is moved into `aside`, and goes with it; it comes back
    where this is cut off between the two renames."""
    if target.exists():
        os.rename(target, aside / "old")
    os.rename(aside / "new", target)


def remove_leftovers(target: Path) -> list[Path]:
    """Remove what killed processes left beside `target` and, for what it holds, in it, and nothing that a live one is
    writing. What they were replacing is whole after that, the old or the new. Returns what went."""
    removed = []
    for path in _candidates(target):
        try:
            lock = _locked(path)
        except BlockingIOError:
            continue
        if lock is None:
            continue
        try:
            if _remove(path):
                removed.append(path)
        finally:
            os.close(lock)
    return removed


def _remove(aside: Path) -> bool:
    """Where `put_in_place` had only moved the old one away, that is put back; where `swap_files` was cut off, its files
    are. False, and all is left as it is, where that cannot be done now."""
    found = _NAME.fullmatch(aside.name)
    assert found is not None
    target = aside.with_name(found[1])
    try:
        settle(aside)
        if (aside / "old").is_dir() and not target.exists():
            os.rename(aside / "old", target)
    except OSError:
        return False
    shutil.rmtree(aside, ignore_errors=True)
    return True


def in_use(target: Path) -> bool:
    """Whether a live process holds a `folder_aside` of `target`, or in it. False where folders cannot be locked."""
    for path in _candidates(target):
        try:
            lock = _locked(path)
        except BlockingIOError:
            return True
        if lock is not None:
            os.close(lock)
    return False


@contextmanager
def folder_held(folder: Path) -> Iterator[None]:
    """Within it nobody else holds `folder`, which is made where it is not there. Raises BlockingIOError where somebody
    does. Where folders cannot be locked nothing is held."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = _locked(folder.resolve())
    try:
        yield
    finally:
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_UN)  # forked processes, such as a data loader's workers, have it open too
            os.close(lock)


def _candidates(target: Path) -> list[Path]:
    return [*_beside(target), *_beside(target / INSIDE)]


def _beside(target: Path) -> list[Path]:
    try:
        found = [(path, _NAME.fullmatch(path.name)) for path in target.parent.iterdir()]
    except OSError:
        return []
    return [path for path, name in found if name is not None and name[1] == target.name]


def _make(target: Path) -> tuple[Path, int]:
    """Whoever finds it between its making and its locking takes it for a leftover: then the next name is tried."""
    for _ in range(_TRIES):
        path = target.parent / f".{target.name}.{secrets.token_hex(6)}.partial"
        path.mkdir()
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        except OSError:  # no locks here: nobody can take it for a leftover
            return path, lock
        if os.fstat(lock).st_nlink and path.exists():
            return path, lock
        os.close(lock)
    raise OSError(f"no folder could be made beside {target}")


def _locked(path: Path) -> int | None:
    """A lock on a folder that nobody holds; None where it cannot be told. BlockingIOError where somebody does."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise
    except OSError:
        os.close(lock)
        return None
    return lock
