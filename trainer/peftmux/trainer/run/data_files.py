"""Data files as runs take them: what several runs on one base want alike is read and tokenised once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from peftmux.trainer.data import Row, encode_labelled, encode_preferences, encode_rows, file_digest, read_rows
from peftmux.trainer.files.card import DataFacts
from peftmux.trainer.settings.options import NEXT_TOKEN, RunOptions

_Held = TypeVar("_Held")


class DataFiles:
    """Holds all that was asked of it, as it was then: for the time in which runs are made ready.

    What it gives is given to several runs, none of which changes it.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[object, ...], Any] = {}

    def rows(self, path: str, options: RunOptions) -> list[Row]:
        """Raises DataError."""
        task = options.task if options.loss == NEXT_TOKEN else options.loss
        return self._once((read_rows, path, task), lambda: read_rows(path, task))

    def digest(self, path: str) -> str:
        """sha256 of the file."""
        return self._once((file_digest, path), lambda: file_digest(path))

    def encoded(self, path: str, tokenizer: Any, options: RunOptions, limit: int, labels: Sequence[str]) -> DataFacts:
        """limit: of a row's tokens. labels: a classifier's; empty for what is written. Raises DataError."""
        asked = (options.task, options.loss, options.over_long, options.append_eos, limit, tuple(labels))
        return self._once((path, *asked), lambda: self._encode(path, tokenizer, options, limit, labels))

    def _encode(self, path: str, tokenizer: Any, options: RunOptions, limit: int, labels: Sequence[str]) -> DataFacts:
        rows = self.rows(path, options)
        if labels:  # the last label stands after a row, so the row has one token less
            encoded = encode_labelled(rows, tokenizer, path, labels, max_length=limit - 1, over_long=options.over_long)
        else:
            encode = encode_rows if options.loss == NEXT_TOKEN else encode_preferences
            encoded = encode(
                rows, tokenizer, path, max_length=limit, over_long=options.over_long, append_eos=options.append_eos
            )
        return DataFacts(Path(path).name, self.digest(path), encoded)

    def _once(self, key: tuple[object, ...], make: Callable[[], _Held]) -> _Held:
        if key not in self._held:
            self._held[key] = make()
        held: _Held = self._held[key]
        return held
