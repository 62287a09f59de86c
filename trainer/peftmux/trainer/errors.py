"""Why a training run cannot start or go on. Messages say what was expected and what was found.

TrainerError
|-- DataError    a data file or one of its rows is bad: names the file and the line
`-- OptionError  an option has a bad value, or does not fit the model, the method or another option
"""

from __future__ import annotations

from pathlib import Path


class TrainerError(Exception):
    """Base of everything the trainer refuses."""


class DataError(TrainerError):
    """A bad data file. `line` is 1-based (in Parquet: the row's number); None speaks of the whole file."""

    def __init__(self, path: str | Path, line: int | None, message: str) -> None:
        super().__init__(f"{path}: {message}" if line is None else f"{path}:{line}: {message}")
        self.path = Path(path)
        self.line = line


class OptionError(TrainerError):
    """A bad option. `option` is its name as on the command line, without dashes."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(f"{option}: {message}")
        self.option = option
