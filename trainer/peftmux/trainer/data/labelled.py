"""Rows for classification: {text, label} for whole sequences, {tokens, labels} for the words of one.

Encoded as everything else that is learned: the class of token i is the label that follows it, so that a classifier's
batches, their virtual tokens, packs and losses are those of a language model over the label names. A word whose label
is -100 is read and not learned; -100 is no label's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peftmux.trainer.data.encode import IGNORED, EncodedData, Example, OverLong, is_dropped, none_left
from peftmux.trainer.data.rows import NOT_LEARNED, Row, is_learned, labels_of
from peftmux.trainer.errors import DataError, OptionError

Task = Literal["generation", "sequence", "token"]


@dataclass(frozen=True, slots=True)
class LabelledExample(Example):
    """`labels[i]` is the index of token i's label name, IGNORED where it has none."""

    def feature(self) -> dict[str, Any]:
        """One token longer, for the last label to follow: nothing sees what stands there."""
        labels = [IGNORED, *self.labels]
        first = next(i for i, label in enumerate(labels) if label != IGNORED)
        return {"input_ids": [*self.input_ids, self.input_ids[-1]], "labels": labels, "first_label": first}

    @property
    def prompt(self) -> int:
        """All of it."""
        return len(self.input_ids)

    @property
    def learned(self) -> int:
        return sum(label != IGNORED for label in self.labels)


def label_names(rows: Sequence[Row], given: Sequence[str] | None) -> tuple[str, ...]:
    """The names in the order of their indices: as given, else the rows' own, sorted (numbers by size).

    Raises OptionError for fewer than two, and for -100 as one.
    """
    found = {label for row in rows for label in labels_of(row.fields) if is_learned(label)}
    if given is None:
        numbers = all(isinstance(label, int) for label in found)
        names = [
            str(label) for label in (sorted(found, key=int) if numbers else sorted({str(label) for label in found}))
        ]
    else:
        names = list(given)
    if len(set(names)) != len(names) or len(names) < 2 or not all(names):
        raise OptionError("labels", f"expected two or more different names, got {names}"[:200])
    if not all(map(is_learned, names)):
        raise OptionError("labels", f"expected names, got {NOT_LEARNED}, which says that a word is not learned")
    return tuple(names)


def encode_labelled(
    rows: Sequence[Row],
    tokenizer: Any,
    path: str | Path,
    names: Sequence[str],
    *,
    max_length: int,
    over_long: OverLong = "error",
) -> EncodedData:
    """Tokenise checked rows as a server tokenises the same text. `max_length` is in tokens.

    A sequence's label is its last token's that is no padding, a word's that of all of its tokens. Raises DataError: a
    label that is not among `names`, a longer row (unless `over_long` cuts or drops it), a row without tokens to learn.
    """
    index = {name: i for i, name in enumerate(names)}
    examples: list[Example] = []
    truncated = dropped = 0
    for row in rows:
        classes = [_index(label, index, path, row) for label in labels_of(row.fields)]
        ids, words = _tokens(row, tokenizer)
        if len(ids) > max_length:
            if is_dropped(len(ids), max_length, over_long, path, row.line):
                dropped += 1
                continue
            ids, words = ids[:max_length], words[:max_length]
            truncated += 1
        if row.format == "text-label":
            words = [None] * len(words)
            if (last := _last(ids, tokenizer.pad_token_id)) is not None:
                words[last] = 0
        labels = [IGNORED if word is None else classes[word] for word in words]
        if all(label == IGNORED for label in labels):
            raise DataError(path, row.line, f"expected tokens to learn from, found none in its {len(ids)}")
        examples.append(LabelledExample(ids, labels, task=row.task, line=row.line))
    if not examples:
        raise none_left(path, max_length, dropped)
    return EncodedData(examples, rows[0].format, truncated, dropped)


def _index(label: str | int, index: dict[str, int], path: str | Path, row: Row) -> int:
    if not is_learned(label):
        return IGNORED
    try:
        return index[str(label)]
    except KeyError:
        raise DataError(path, row.line, f"label {label!r}: expected one of {', '.join(index)}") from None


def _tokens(row: Row, tokenizer: Any) -> tuple[list[int], list[int | None]]:
    """Ids, and for {tokens, labels} the word that each belongs to."""
    if row.format == "text-label":
        ids = list(tokenizer(str(row.fields["text"]))["input_ids"])
        return ids, [None] * len(ids)
    if not getattr(tokenizer, "is_fast", False):
        raise OptionError("task", "token needs a fast tokenizer, which says where in the text a token stands")
    tokens = row.fields["tokens"]
    assert isinstance(tokens, list)
    encoded = tokenizer(" ".join(tokens), return_offsets_mapping=True)
    return list(encoded["input_ids"]), list(_words(tokens, encoded["offset_mapping"]))


def _words(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> Iterator[int | None]:
    """The word in which a token's last character stands; None for what stands for no character, or for a space."""
    owners: list[int | None] = []
    for index, word in enumerate(words):
        owners += [*[index] * len(word), None]
    for start, end in offsets:
        yield owners[end - 1] if start < end else None


def _last(ids: Sequence[int], pad: int | None) -> int | None:
    """As transformers pools a sequence: the last token that is no padding."""
    return next((i for i in reversed(range(len(ids))) if ids[i] != pad), None)
