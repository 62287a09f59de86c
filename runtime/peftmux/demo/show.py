"""What the demo prints: sections, aligned tables, one-line progress, a stream of words; plain without a terminal."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import TextIO

WIDTH = 96
LONGEST_WORD = 14
_CODES = {"bold": "1", "dim": "2", "green": "32", "red": "31", "cyan": "36"}


class Screen:
    """Writes to one text stream. Colours (not with NO_COLOR) and lines that redraw themselves: on a terminal only."""

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file or sys.stdout
        self.terminal = self.file.isatty()
        self.colours = self.terminal and not os.environ.get("NO_COLOR")
        self.width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns) if self.terminal else WIDTH
        self._column = 0
        self._notes: list[str] = []

    def paint(self, text: str, style: str) -> str:
        return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if self.colours else text

    def line(self, text: str = "") -> None:
        """A line of its own; ends the stream of words that stands before it."""
        self.end_words()
        self._write(f"{text}\n")

    def note(self, text: str) -> None:
        """A line between the words of a stream: written where the next word ends."""
        self._notes.append(text)
        if not self._column:
            self.end_words()

    def section(self, title: str, note: str = "") -> None:
        self.line()
        self.line(self.paint(title, "bold") + (self.paint(f"  {note}", "dim") if note else ""))

    def words(self, text: str, indent: int = 4) -> None:
        """More of a stream, broken at the spaces near the right edge."""
        for character in text:
            space = character.isspace()
            if space and (self._notes or self._column == 0 or self._column > self.width - LONGEST_WORD):
                self.end_words()
                continue
            if self._column == 0:
                self.file.write(" " * indent)
                self._column = indent
            self.file.write(" " if space else character)
            self._column += 1
        self.file.flush()

    def end_words(self) -> None:
        """Finish the stream's line, if one is open, and write the notes that waited for it."""
        if self._column:
            self.file.write("\n")
        self._column = 0
        notes, self._notes = self._notes, []
        for note in notes:
            self.file.write(f"{note}\n")
        self.file.flush()

    def progress(self, text: str, *, done: bool = False) -> None:
        """A line that the next one replaces; without a terminal only the last is written."""
        if self.terminal:
            self._write(f"\r\x1b[2K{text}" + ("\n" if done else ""))
        elif done:
            self._write(f"{text}\n")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[Sequence[str]] = ()) -> None:
        """Left-aligned columns as wide as their widest cell; `styles`: one per cell, "" for none."""
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        self.line("  " + self.paint("   ".join(map(str.ljust, header, widths)).rstrip(), "dim"))
        for index, row in enumerate(rows):
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            if styles:
                cells = [self.paint(c, s) if s else c for c, s in zip(cells, styles[index], strict=True)]
            self.line("  " + "   ".join(cells).rstrip())

    def _write(self, text: str) -> None:
        self.file.write(text)
        self.file.flush()


def bar(share: float, width: int = 20) -> str:
    """A share of 0 to 1 as a bar."""
    full = round(max(0.0, min(1.0, share)) * width)
    return "━" * full + "─" * (width - full)
