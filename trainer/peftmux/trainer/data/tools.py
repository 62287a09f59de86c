"""The tools that a conversation's assistant may call: descriptions in the column `tools`, which chat templates show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peftmux.trainer.data.files import checked_text, parsed_json, type_name
from peftmux.trainer.errors import DataError

COLUMN = "tools"
Tools = tuple[Mapping[str, object], ...]
"""One JSON schema each, as transformers' `apply_chat_template` takes them."""


def row_tools(path: Path, line: int, record: Mapping[str, object]) -> Tools:
    """What the record has in its column `tools`, a list of objects or JSON of one; () without any.

    Raises DataError.
    """
    given = record.get(COLUMN)
    if isinstance(given, str) and given:
        given = parsed_json(path, line, given, f"column {COLUMN!r}: ")
        checked_text(path, line, {COLUMN: given})
    if given is None or given == "":
        return ()
    if not isinstance(given, list):
        raise DataError(path, line, f"column {COLUMN!r}: expected a list of objects, found {type_name(given)}")
    for i, tool in enumerate(given):
        if not isinstance(tool, dict):
            raise DataError(path, line, f"{COLUMN}[{i}]: expected an object, found {type_name(tool)}")
    return tuple(given)
