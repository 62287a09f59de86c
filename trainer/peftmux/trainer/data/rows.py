"""The rows of a data file, checked for what is to be learned from them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peftmux.trainer.data.files import read_records, type_name
from peftmux.trainer.data.images import COLUMN, RowImage, row_images
from peftmux.trainer.data.tools import Tools, row_tools
from peftmux.trainer.errors import DataError

FORMATS: Mapping[str, tuple[str, ...]] = {
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
"""The columns each format of a file needs. Other columns are ignored, but for those that a Row has."""

PREFERENCES: Mapping[str, tuple[str, ...]] = {
    "dpo": ("prompt", "chosen", "rejected"),
    "kto": ("prompt", "completion", "label"),
}
"""The columns that a preference loss needs."""
NOT_LEARNED = -100
"""The label of what is not learned, as torch's cross entropy has it."""
_TASK_FORMATS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "generation": FORMATS,
    "sequence": {"text-label": ("text", "label")},
    "token": {"tokens-labels": ("tokens", "labels")},
}


@dataclass(frozen=True, slots=True)
class Row:
    """One checked row. `line` is 1-based: the line of a JSONL file, the row of a Parquet file."""

    line: int
    format: str
    fields: Mapping[str, object]
    task: str | int | None = None
    """The column `task`, for methods that learn several at once."""
    images: tuple[RowImage, ...] | None = None
    """The column `images`; None without it, and the text's markers are plain text."""
    tools: Tools = ()
    """The column `tools` beside messages."""


def read_rows(path: str | Path, task: str = "generation") -> list[Row]:
    """All rows of a file, in order, each checked for its columns and their types.

    `task` is "generation", "sequence", "token", or one of PREFERENCES, whose columns every row must have; otherwise the
    first row decides the file's format, and every other row must have the same columns.
    Raises DataError with the file and the line: no such file, no rows, broken JSON, a missing column, a wrong type, a
    row with nothing to learn.
    """
    path = Path(path)
    rows: list[Row] = []
    kind = ""
    for line, record in read_records(path):
        if task != "generation" and record.get(COLUMN) is not None:
            raise DataError(
                path, line, f"column {COLUMN!r}: only text is learned from images, not --task or --loss {task}"
            )
        if task in PREFERENCES:
            rows.append(Row(line, task, _checked_preference(path, line, record, task)))
            continue
        kind = kind or _detect_format(path, line, record, _TASK_FORMATS[task])
        fields = _checked(path, line, record, kind)
        tools = row_tools(path, line, record) if kind == "messages" else ()
        rows.append(Row(line, kind, fields, _task_of(record), row_images(path, line, record), tools))
    if not rows:
        raise DataError(path, None, "expected at least one row, found an empty file")
    return rows


def file_digest(path: str | Path) -> str:
    """sha256 (hex) of the file's bytes: what the model card names as the data."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _detect_format(path: Path, line: int, record: Mapping[str, object], formats: Mapping[str, tuple[str, ...]]) -> str:
    matching = [name for name, columns in formats.items() if all(c in record for c in columns)]
    if len(matching) == 1:
        return matching[0]
    wanted = " or ".join("{" + ", ".join(columns) + "}" for columns in formats.values())
    found = ", ".join(map(repr, record)) or "none"
    if matching:
        raise DataError(path, line, f"expected the columns of one format, {wanted}; found several: {found}")
    raise DataError(path, line, f"expected the columns {wanted}; found {found}")


def _checked(path: Path, line: int, record: Mapping[str, object], kind: str) -> Mapping[str, object]:
    columns = next(own[kind] for own in _TASK_FORMATS.values() if kind in own)
    for column, task in (("label", "sequence"), ("labels", "token")):
        if kind in FORMATS and column in record:
            raise DataError(path, line, f"column {column!r} is for classification: give --task {task}")
    _check_present(path, line, record, columns, f"the file's rows are {kind}")
    for column in columns:
        if kind == "messages":
            _check_messages(path, line, record[column])
        elif column in ("tokens", "labels"):
            _check_list(path, line, column, record[column])
        elif column == "label":
            _check_label(path, line, "column 'label'", record[column])
        elif not isinstance(record[column], str):
            raise DataError(path, line, f"column {column!r}: expected a string, found {type_name(record[column])}")
    if kind in ("prompt-completion", "text") and not record[columns[-1]]:
        raise DataError(path, line, f"column {columns[-1]!r}: expected text to learn, found an empty string")
    if kind == "tokens-labels" and len(record["tokens"]) != len(record["labels"]):  # type: ignore[arg-type]
        sizes = f"{len(record['tokens'])} and {len(record['labels'])}"  # type: ignore[arg-type]
        raise DataError(path, line, f"expected one label for each of the tokens, found {sizes}")
    fields = {column: record[column] for column in columns}
    if kind in ("text-label", "tokens-labels") and not any(map(is_learned, labels_of(fields))):
        what = "column 'label'" if kind == "text-label" else "column 'labels'"
        raise DataError(path, line, f"{what}: expected something to learn, found {NOT_LEARNED}, which is not learned")
    return fields


def labels_of(fields: Mapping[str, object]) -> list[str | int]:
    """Of {text, label} the one, of {tokens, labels} all."""
    return fields["labels"] if "tokens" in fields else [fields["label"]]  # type: ignore[return-value, list-item]


def is_learned(label: str | int) -> bool:
    """Numbers are names as they are written."""
    return str(label) != str(NOT_LEARNED)


def _task_of(record: Mapping[str, object]) -> str | int | None:
    task = record.get("task")
    return task if isinstance(task, str | int) and not isinstance(task, bool) else None


def _check_list(path: Path, line: int, column: str, value: object) -> None:
    if not isinstance(value, list) or not value:
        raise DataError(path, line, f"column {column!r}: expected a list, found {type_name(value)}")
    for i, item in enumerate(value):
        if column == "labels":
            _check_label(path, line, f"labels[{i}]", item)
        elif not isinstance(item, str) or not item.strip():
            raise DataError(path, line, f"tokens[{i}]: expected a word, found {type_name(item)}")


def _check_label(path: Path, line: int, where: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(path, line, f"{where}: expected a name or a whole number, found {type_name(value)}")


def _checked_preference(path: Path, line: int, record: Mapping[str, object], loss: str) -> Mapping[str, object]:
    """A label may be true or false, or 1 or 0."""
    columns = PREFERENCES[loss]
    _check_present(path, line, record, columns, f"--loss {loss} learns from {{{', '.join(columns)}}}")
    for column in columns:
        value = record[column]
        if column == "label":
            if value not in (True, False, 0, 1):
                raise DataError(path, line, f"column 'label': expected true or false, found {value!r}"[:200])
        elif not isinstance(value, str):
            raise DataError(path, line, f"column {column!r}: expected a string, found {type_name(value)}")
        elif column != "prompt" and not value:
            raise DataError(path, line, f"column {column!r}: expected text, found an empty string")
    return {column: record[column] for column in columns}


def _check_present(path: Path, line: int, record: Mapping[str, object], columns: tuple[str, ...], because: str) -> None:
    for column in columns:
        if column not in record:
            found = ", ".join(map(repr, record)) or "none"
            raise DataError(path, line, f"missing column {column!r} ({because}); found {found}")


def _calls_tools(message: object) -> bool:
    """Whether its content may be null."""
    return isinstance(message, dict) and isinstance(message.get("tool_calls"), list) and bool(message["tool_calls"])


def _check_messages(path: Path, line: int, messages: object) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(path, line, f"column 'messages': expected a list of messages, found {type_name(messages)}")
    for i, message in enumerate(messages):
        for key in ("role", "content"):
            value = message.get(key) if isinstance(message, dict) else None
            if not isinstance(value, str) and not (key == "content" and value is None and _calls_tools(message)):
                raise DataError(path, line, f"messages[{i}].{key}: expected a string, found {type_name(value)}")
    if not any(m["role"] == "assistant" for m in messages):
        raise DataError(path, line, "expected at least one message of role 'assistant' to learn from, found none")
