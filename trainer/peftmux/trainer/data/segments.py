"""A row as a run of texts, each learned or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftmux.trainer.data.rows import Row
from peftmux.trainer.data.tools import COLUMN, Tools
from peftmux.trainer.errors import DataError


@dataclass(frozen=True, slots=True)
class Segment:
    """`ends_turn`: the model is to stop after it, and the text itself does not say so: an end token follows."""

    text: str
    learned: bool
    ends_turn: bool = False


_PROBE = "peftmux"
"""A content that no template has by itself."""


def segment_rows(rows: Sequence[Row], tokenizer: Any, path: str | Path) -> list[list[Segment]]:
    """Texts joined are the row's whole text. Raises DataError where a chat template is missing or cannot be used."""
    if rows and rows[0].format == "messages" and not getattr(tokenizer, "chat_template", None):
        message = "rows of {messages} need a tokenizer with a chat template; this one has none"
        raise DataError(path, rows[0].line, message)
    chats = _Chats(tokenizer, path)
    return [_segments(row, chats) for row in rows]


def _segments(row: Row, chats: _Chats) -> list[Segment]:
    match row.format:
        case "prompt-completion":
            prompt, completion = str(row.fields["prompt"]), str(row.fields["completion"])
            return [Segment(prompt, learned=False), Segment(completion, learned=True, ends_turn=True)]
        case "text":
            return [Segment(str(row.fields["text"]), learned=True, ends_turn=True)]
    messages = row.fields["messages"]
    assert isinstance(messages, list)
    return chats.segments(messages, row.tools, row.line)


Messages = Sequence[Mapping[str, Any]]


class _Chats:
    """Conversations of one file, as the tokenizer's chat template writes them."""

    def __init__(self, tokenizer: Any, path: str | Path) -> None:
        self._tokenizer = tokenizer
        self._path = path
        self._marked: dict[bool, bool] = {}

    def segments(self, messages: Messages, tools: Tools, line: int) -> list[Segment]:
        """Every assistant turn is learned: what the template adds from its generation prompt to the end of the turn.

        The template is given the tools wherever it writes the conversation or a part of it.
        """
        if tools:
            self._check_shown(messages, tools, line)
        segments: list[Segment] = []
        done = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            after = self._render(messages[: i + 1], tools, False, line)
            if i:
                before = self._render(messages[:i], tools, True, line)
            else:
                before = self._opening(messages[:1], tools, after, line)
            if not (before.startswith(done) and after.startswith(before)):
                advice = "give each of its assistant turns a row of its own"
                raise DataError(self._path, line, f"messages[{i}]: the chat template rewrites earlier turns; {advice}")
            marked = self._marks_ends(messages[:i], tools, line)
            done_before, done = done, after[: len(before) + len(after[len(before) :].rstrip())] if marked else after
            segments.append(Segment(before[len(done_before) :], learned=False))
            segments.append(Segment(done[len(before) :], learned=True, ends_turn=not marked))
        return segments

    def _check_shown(self, messages: Messages, tools: Tools, line: int) -> None:
        """Raises DataError for a template that writes the same without them: they would be lost without a word."""
        end = max(i for i, message in enumerate(messages) if message["role"] == "assistant") + 1
        shown = self._render(messages[:end], tools, False, line)
        try:
            plain = self._render(messages[:end], (), False, line)
        except DataError:  # it needs them
            return
        if shown == plain:
            message = "the tokenizer's chat template shows no tools; without the column it is trained without them"
            raise DataError(self._path, line, f"column {COLUMN!r}: {message}")

    def _opening(self, first: Messages, tools: Tools, after: str, line: int) -> str:
        """What stands before the content of a conversation's first turn, where that is the assistant's."""
        asked = self._render(first, tools, True, line)[len(self._render(first, tools, False, line)) :]
        head, found, _ = after.partition(asked) if asked else ("", "", "")
        return head + found if found else ""

    def _marks_ends(self, messages: Messages, tools: Tools, line: int) -> bool:
        """Whether the template writes something after a turn's content; asked once for all conversations with tools,
        for which a tokenizer may have a template of its own, and once for those without."""
        key = bool(tools)
        if key not in self._marked:
            turn = {"role": "assistant", "content": _PROBE}
            self._marked[key] = not self._render([*messages, turn], tools, False, line).rstrip().endswith(_PROBE)
        return self._marked[key]

    def _render(self, messages: Messages, tools: Tools, prompt: bool, line: int) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # the template is a program of the tokenizer's author: any error may come out of it
            raise DataError(self._path, line, f"the chat template refuses these messages: {error}") from None
        return str(text)
