"""Where a run will write, tried before it begins."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainingArguments

from peftmux.adapters.aside import in_use, remove_leftovers
from peftmux.adapters.source import valid_name
from peftmux.trainer.errors import OptionError
from peftmux.trainer.settings.argument_checks import plain
from peftmux.trainer.settings.options import RunOptions, named

_claims: set[socket.socket] = set()


def _let_go_of_claims() -> None:
    """A forked process, such as a data loader's worker, holds nothing: it may live longer than the run."""
    for held in _claims:
        held.close()
    _claims.clear()


os.register_at_fork(after_in_child=_let_go_of_claims)


@contextmanager
def claimed(out: str | Path) -> Iterator[None]:
    """Within it no other run on this machine writes to `out`. Raises OptionError where one does already.

    What is held is an abstract Unix socket's name (Linux): nothing in the file system, and the kernel frees it however
    the process ends. Where there are no such sockets nothing is held. Machines, or containers with networks of their
    own, that share a file system do not see each other's: between them only the locks of `folder_aside` and of the
    checkpoints' folder tell.
    """
    place = _resolved(out)
    held = _bound(b"\0peftmux/" + hashlib.sha256(os.fsencode(place)).hexdigest().encode(), place)
    try:
        yield
    finally:
        if held is not None:
            _claims.discard(held)
            held.close()


def _bound(name: bytes, place: Path) -> socket.socket | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    except OSError:
        return None
    try:
        held.bind(name)
    except OSError as error:
        held.close()
        if error.errno == errno.EADDRINUSE:
            raise OptionError("out", f"another run is writing to {place}") from None
        return None
    _claims.add(held)
    return held


def check_out(options: RunOptions) -> None:
    """Raises OptionError where the adapter cannot be put. What a killed run left there is removed, or put in place."""
    adapter_name(options.out)
    out = _resolved(options.out)
    if not options.dry_run:
        remove_leftovers(out)
    try:
        if out.is_file():
            raise OptionError("out", f"expected a folder or nothing at {out}, found a file")
        if out.is_dir() and any(out.iterdir()) and not (options.overwrite or options.dry_run):
            raise OptionError("out", f"{out} is not empty; give --overwrite to replace the adapter in it")
    except OSError as error:
        raise OptionError("out", f"{options.out}: {error.strerror or error}") from None
    if options.dry_run:
        return
    _check_writable("out", out if out.is_dir() else out.parent)
    if in_use(out):
        raise OptionError("out", f"another run is writing to {out}")
    if options.publish:
        for name in published_names(options):
            _check_published(Path(options.publish), name, out)


def _resolved(out: str | Path) -> Path:
    """What a link leads to is written, however it is spelled. Raises OptionError where that cannot be told."""
    try:
        return Path(out).resolve()
    except (OSError, RuntimeError) as error:  # Python before 3.13 raises the second for links in a circle
        raise OptionError("out", f"{out}: {getattr(error, 'strerror', None) or error}") from None


def check_output_dir(args: TrainingArguments) -> None:
    """The folder of the checkpoints and logs, where there will be any. Raises OptionError."""
    if plain(args.save_strategy) != "no" or args.report_to:
        _check_writable("output-dir", Path(args.output_dir or "."))


def adapter_name(out: str | Path) -> str:
    """What an adapter at `out` is called: the path's last component where that is a name, as in "a/b", else that of the
    folder it leads to, as for ".". Raises OptionError where that has none either."""
    name = named(out).name
    if not name:
        raise OptionError("out", f"expected a folder with a name, got {out}")
    return name


def published_names(options: RunOptions) -> list[str]:
    """What is put into --publish: the adapter under its own name, or an ensemble's members under numbers after it."""
    name = adapter_name(options.out)
    return [name] if options.ensemble is None else [f"{name}-{i}" for i in range(options.ensemble)]


def published_place(directory: str | Path, name: str) -> Path:
    """Where an adapter is published as `name`. Raises OptionError for a name under which no server would load it."""
    if not valid_name(name) or "/" in name:
        message = f"no server takes the name {name!r}: expected up to 128 letters, digits, '.', '_', '-' that begin "
        raise OptionError("publish", f"{message}with a letter or digit, as the last name of --out")
    return Path(directory) / name


def _check_published(directory: Path, name: str, out: Path) -> None:
    """Raises OptionError where an adapter cannot be put into `directory` under `name`. out: resolved."""
    target = published_place(directory, name)
    if not directory.is_dir():
        found = "a file" if directory.exists() else "nothing"
        raise OptionError("publish", f"expected a folder that a server watches, found {found} at {directory}")
    if directory.resolve().is_relative_to(out):
        raise OptionError("publish", f"expected a folder that does not lie in --out, got {directory} and {out}")
    if target.is_file():
        raise OptionError("publish", f"expected a folder or nothing at {target}, found a file")
    if target.resolve() in out.parents:
        raise OptionError("publish", f"would replace {target}, in which --out lies")
    _check_writable("publish", directory)


def _check_writable(option: str, folder: Path) -> None:
    """Tried where it is there, else where it will be made: permissions alone do not tell."""
    try:
        place = folder.absolute()
        while not place.exists():
            place = place.parent
        os.rmdir(tempfile.mkdtemp(prefix=".peftmux.", dir=place))
    except OSError as error:
        raise OptionError(option, f"{folder} cannot be written to: {error.strerror or error}") from None
