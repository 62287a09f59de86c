"""Values as they are written on a command line. Each raises argparse.ArgumentTypeError with expected and got."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTISATIONS = ("nf4", "int8", "fp8")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", re.IGNORECASE)


def size(text: str) -> int:
    """Bytes: 2GiB, 500MB, 1.5Gi, 1073741824."""
    match = _SIZE.fullmatch(text.strip())
    unit = match.group(2).lower() if match else ""
    if match is None or unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"expected a size such as 2GiB, 500MB or 1073741824, got {text!r}")
    return int(float(match.group(1)) * _UNITS[unit])


def positive(text: str) -> int:
    return _whole(text, 1)


def natural(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected a whole number >= {least}, got {text!r}")
    return value


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds >= 0, got {text!r}")
    return value


def interval(text: str) -> float:
    """Seconds, more than none."""
    if (value := seconds(text)) == 0:
        raise argparse.ArgumentTypeError(f"expected a number of seconds > 0, got {text!r}")
    return value


def address(text: str) -> str:
    """HOST:PORT, with [] around an IPv6 host; port 0 takes a free one."""
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdecimal() and int(port) < 65536):
        raise argparse.ArgumentTypeError(f"expected HOST:PORT with a port of 0 to 65535, got {text!r}")
    return text


def address_or_off(text: str) -> str | None:
    return None if text.lower() in ("off", "false") else address(text)  # YAML reads a bare off as false


def named_path(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (equals and name and path):
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, got {text!r}")
    return name, path


def weights(text: str) -> list[tuple[str, float]]:
    """NAME=WEIGHT, separated by commas: the terms of a weighted sum of adapters."""
    terms = []
    for term in text.split(","):
        name, equals, weight = term.strip().partition("=")
        try:
            terms.append((name, float(weight)))
        except ValueError:
            equals = ""
        if not (name and equals):
            raise argparse.ArgumentTypeError(f"expected NAME=WEIGHT,NAME=WEIGHT,..., got {text!r}")
    return terms


def existing_file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"expected a file, got {text!r}, which is none")
    return path


def folder(text: str) -> str:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got {text!r}, which is none")
    return text
