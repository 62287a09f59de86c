"""Where an adapter may come from, and what it may be called."""

from __future__ import annotations

import os
import re
from pathlib import Path

from peftmux.adapters.errors import SourceForbidden, SourceNotFound

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_NAME = re.compile(rf"{_PART}(/{_PART})?")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_MAX_SOURCE = 1024

NAME_RULE = "parts of up to 128 letters, digits, '.', '_', '-' that begin with a letter or digit, at most two with '/'"


def valid_name(name: str) -> bool:
    """Whether an adapter may be loaded under this name."""
    return _NAME.fullmatch(name) is not None


def resolve_source(source: str, root: str | Path | None) -> Path:
    """The adapter folder that `source` names under the adapter root, symbolic links followed.

    An absolute path is taken as one, and like any other must lie inside the root. Raises SourceForbidden (without
    telling whether anything exists out there) and SourceNotFound.
    """
    if scheme := _SCHEME.match(source):
        raise SourceForbidden(
            f"scheme {scheme.group()[:40]!r} is not allowed on this server: expected a path under the adapter root "
            "(remote sources are not offered yet)"
        )
    if root is None:
        raise SourceForbidden("this server has no adapter root: start it with --adapters DIR")
    if not source or len(source) > _MAX_SOURCE or not source.isprintable():
        raise SourceForbidden(f"expected a path of 1 to {_MAX_SOURCE} printable characters, got {len(source)}")
    real_root = os.path.realpath(root)
    real = Path(os.path.realpath(os.path.join(real_root, source)))
    if not real.is_relative_to(real_root):
        raise SourceForbidden(f"{source!r} lies outside the adapter root")
    if not real.is_dir():
        raise SourceNotFound(f"no adapter folder {source!r} under the adapter root")
    return real
