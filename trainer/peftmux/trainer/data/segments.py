"""A row as a run of texts, each learned or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftmux.trainer.data.rows import Row
from peftmux.trainer.errors import DataError


@dataclass(frozen=True, slots=True)
class Segment:
    """`ends_turn`: the model is to stop after it, and the text itself does not say so: an end token follows."""

    text: str
    learned: bool
    ends_turn: bool = False


def segment_rows(rows: Sequence[Row], tokenizer: Any, path: str | Path) -> list[list[Segment]]:
    """Texts joined are the row's whole text. Raises DataError where a chat template is missing or cannot be used."""
    if rows and rows[0].format == "messages" and not getattr(tokenizer, "chat_template", None):
        message = "rows of {messages} need a tokenizer with a chat template; this one has none"
        raise DataError(path, rows[0].line, message)
    return [_segments(row, tokenizer, path) for row in rows]


def _segments(row: Row, tokenizer: Any, path: str | Path) -> list[Segment]:
    match row.format:
        case "prompt-completion":
            prompt, completion = str(row.fields["prompt"]), str(row.fields["completion"])
            return [Segment(prompt, learned=False), Segment(completion, learned=True, ends_turn=True)]
        case "text":
            return [Segment(str(row.fields["text"]), learned=True, ends_turn=True)]
    messages = row.fields["messages"]
    assert isinstance(messages, list)
    return _chat_segments(messages, tokenizer, path, row.line)


def _chat_segments(messages: list[Mapping[str, str]], tokenizer: Any, path: str | Path, line: int) -> list[Segment]:
    """Every assistant turn is learned: what the template adds from its generation prompt to the end of the turn."""
    segments: list[Segment] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:i], True, tokenizer, path, line) if i else ""
        after = _render(messages[: i + 1], False, tokenizer, path, line)
        if not (before.startswith(done) and after.startswith(before)):
            advice = "give each of its assistant turns a row of its own"
            raise DataError(path, line, f"messages[{i}]: the chat template rewrites earlier turns; {advice}")
        turn = after[len(before) :]
        ends_bare = turn.rstrip().endswith(message["content"].rstrip())
        segments.append(Segment(before[len(done) :], learned=False))
        if ends_bare:
            segments.append(Segment(turn, learned=True, ends_turn=True))
        else:
            marked = turn.rstrip()
            segments.append(Segment(marked, learned=True))
        done = after if ends_bare else after[: len(before) + len(turn.rstrip())]
    return segments


def _render(messages: list[Mapping[str, str]], prompt: bool, tokenizer: Any, path: str | Path, line: int) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # the template is a program of the tokenizer's author: any error may come out of it
        raise DataError(path, line, f"the chat template refuses these messages: {error}") from None
    return str(text)
