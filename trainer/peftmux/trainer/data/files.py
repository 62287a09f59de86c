"""The records of a data file: JSON lines, or Parquet where pyarrow is installed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from peftmux.trainer.errors import DataError

Record = Mapping[str, object]

_MAGIC = {
    b"\x1f\x8b": "a gzip file",
    b"PK\x03\x04": "a zip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"PAR1": "Parquet",
}
_HALVES = re.compile(rb"\\u[dD][89a-fA-F]")
"""Where a character beyond U+FFFF is written as an escape, as its two halves must stand together."""

_TOO_DEEP = "its values are nested too deeply to be read"


def read_records(path: Path) -> Iterator[tuple[int, Record]]:
    """(line, record) of each row, in order; of a Parquet file (row, record). Both count from 1.

    Raises DataError with the file, and the line where one is to blame: a file that is none or cannot be read, a line
    that is no JSON object, that has a key twice, a number or a nesting beyond what Python reads, or half a character.
    """
    try:
        if not path.is_file():
            raise DataError(path, None, f"expected a file of rows, found {_what_else(path)}")
        yield from _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_json_lines(path)
    except OSError as error:
        raise DataError(path, None, f"cannot be read: {error.strerror or error}") from None


def _what_else(path: Path) -> str:
    if path.is_dir():
        return "a folder"
    return "a pipe or a device" if path.exists() else "nothing"


def _read_json_lines(path: Path) -> Iterator[tuple[int, Record]]:
    """Blank lines are skipped; numbering counts them."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                _check_text(path, raw)
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                message = f"expected UTF-8 text, found {error.reason} at byte {error.start}"
                raise DataError(path, number, message) from None
            if not text.strip():
                continue
            advice = "; expected one JSON object a line" if number == 1 else ""
            record = parsed_json(path, number, text, advice=advice)
            if not isinstance(record, dict):
                raise DataError(path, number, f"expected a JSON object, found {type_name(record)}")
            if _HALVES.search(raw):
                checked_text(path, number, record)
            yield number, record


def _check_text(path: Path, raw: bytes) -> None:
    """Before its first line is blamed for what the whole file is."""
    for magic, name in _MAGIC.items():
        if raw.startswith(magic):
            raise DataError(path, 1, f"expected JSON lines, found {name}")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(path, 1, "expected UTF-8 text, found UTF-16")


class _DoubleKeyError(ValueError):
    pass


def _without_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise _DoubleKeyError(next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i])))
    return record


def parsed_json(path: Path, line: int, text: str, where: str = "", advice: str = "") -> object:
    """Raises DataError, which `where` begins; of broken JSON `advice` ends it."""
    try:
        return json.loads(text, object_pairs_hook=_without_doubles)
    except _DoubleKeyError as error:
        raise DataError(path, line, f"{where}key {error.args[0]!r} is there twice") from None
    except json.JSONDecodeError as error:
        raise DataError(path, line, f"{where}broken JSON: {error.msg} at column {error.pos + 1}{advice}") from None
    except RecursionError:
        raise DataError(path, line, f"{where}{_TOO_DEEP}") from None
    except ValueError:  # Python's limit to the digits of a whole number
        raise DataError(path, line, f"{where}a number has too many digits to be read") from None


def checked_text(path: Path, line: int, record: Record) -> None:
    """Raises DataError where there is text that no tokenizer takes."""
    try:
        where = _half(record, "")
    except RecursionError:
        raise DataError(path, line, _TOO_DEEP) from None
    if where is not None:
        raise DataError(path, line, f"{where}: expected whole characters, found half of one (a lone surrogate)")


def _half(value: object, where: str) -> str | None:
    """Where there is half of a surrogate pair."""
    if isinstance(value, str):
        return where if any("\ud800" <= c <= "\udfff" for c in value) else None
    if isinstance(value, dict):
        inner = [(key, f"{where}.{key}" if where else f"column {key!r}") for key in value]
        found = [_half(key, f"key {key!r}") or _half(value[key], place) for key, place in inner]
    elif isinstance(value, list):
        found = [_half(item, f"{where}[{i}]") for i, item in enumerate(value)]
    else:
        return None
    return next((place for place in found if place is not None), None)


def _read_parquet(path: Path) -> Iterator[tuple[int, Record]]:
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise DataError(path, None, "Parquet needs pyarrow: install it, or give JSON lines") from None
    try:
        records = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise DataError(path, None, f"expected a Parquet file: {error}") from None
    for row, record in enumerate(records, start=1):
        yield row, {name: _present(value) for name, value in record.items()}


def _present(value: object) -> object:
    """Every struct of a column has the fields of all of them: one that is null was not in this one."""
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value


def type_name(value: object) -> str:
    """As a message says what was found."""
    if isinstance(value, list) and not value:
        return "an empty list"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", int: "a number", float: "a number"}
    return "null or nothing" if value is None else names.get(type(value), type(value).__name__)
