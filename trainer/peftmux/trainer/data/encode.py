"""From rows to token ids and labels. Learned is what the model is to write: completions, assistant turns, texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from peftmux.trainer.data.images import PlacedImage, split_at_images
from peftmux.trainer.data.rows import NOT_LEARNED, Row
from peftmux.trainer.data.segments import Segment, segment_rows
from peftmux.trainer.errors import DataError

IGNORED = NOT_LEARNED
"""The label of a token that is not learned."""

OverLong = Literal["error", "truncate", "drop"]


@dataclass(frozen=True, slots=True)
class Example:
    """One row as the model sees it. `labels[i]` is `input_ids[i]` where it is learned, IGNORED elsewhere."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False
    """Whether its end was cut off."""
    task: str | int | None = None
    """The row's column `task`."""
    line: int = 0
    images: tuple[PlacedImage, ...] = ()
    """In the order in which they stand."""

    @property
    def prompt(self) -> int:
        """Tokens before the first that is learned: what a server will be asked."""
        return next((i for i, label in enumerate(self.labels) if label != IGNORED), len(self.labels))

    def feature(self) -> dict[str, Any]:
        """As the Trainer's samplers and the collator take it.

        first_label: index of the first learned token that some token precedes (position 0 is never predicted).
        """
        first = next(i for i, label in enumerate(self.labels) if i and label != IGNORED)
        return {"input_ids": self.input_ids, "labels": self.labels, "first_label": first}

    def with_inserted(self, groups: Iterable[tuple[int, Sequence[int]]]) -> Example:
        """With tokens that are not learned. groups: (index of the token that they stand before, they), in order."""
        ids, labels, done = [], [], 0
        for at, tokens in groups:
            ids += [*self.input_ids[done:at], *tokens]
            labels += [*self.labels[done:at], *[IGNORED] * len(tokens)]
            done = at
        return replace(self, input_ids=[*ids, *self.input_ids[done:]], labels=[*labels, *self.labels[done:]])

    @property
    def learned(self) -> int:
        """How many tokens are learned."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True, slots=True)
class EncodedData:
    """All examples of a file, with what was done to get them."""

    examples: list[Example]
    format: str
    truncated: int = 0
    dropped: int = 0

    @property
    def rows(self) -> int:
        return len(self.examples)

    def features(self) -> list[dict[str, Any]]:
        return [example.feature() for example in self.examples]

    @property
    def tokens(self) -> int:
        return sum(len(e.input_ids) for e in self.examples)

    @property
    def learned_tokens(self) -> int:
        return sum(example.learned for example in self.examples)


def encode_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    path: str | Path,
    *,
    max_length: int,
    over_long: OverLong = "error",
    append_eos: bool = True,
) -> EncodedData:
    """Tokenise checked rows. `max_length` is in tokens, the end-of-sequence token included.

    A row's tokens begin with exactly the tokens its prompt alone would get, so that what is learned is what a server
    will be asked. Raises DataError: a row longer than `max_length` (unless `over_long` cuts its end or drops it; both
    are counted), a row that would have nothing to learn, no row left.
    """
    found = encode_each(rows, tokenizer, path, max_length=max_length, over_long=over_long, append_eos=append_eos)
    examples = [example for example in found if example is not None]
    if not examples:
        raise none_left(path, max_length, len(rows))
    truncated = sum(example.truncated for example in examples)
    return EncodedData(examples, rows[0].format, truncated, len(rows) - len(examples))


def encode_each(
    rows: Sequence[Row],
    tokenizer: Any,
    path: str | Path,
    *,
    max_length: int,
    over_long: OverLong,
    append_eos: bool,
) -> list[Example | None]:
    """Of each row its example, None where it is dropped; DataError as in `encode_rows`."""
    bos, eos = _special_prefix(tokenizer), tokenizer.eos_token_id
    pieces = [
        _pieces(row, segments, path) for row, segments in zip(rows, segment_rows(rows, tokenizer, path), strict=True)
    ]
    runs = iter(_tokenise([piece for row in pieces for piece in row], tokenizer))
    found: list[Example | None] = []
    for row, own in zip(rows, pieces, strict=True):
        front = [] if row.format == "messages" else bos
        example = _assemble(row, own, [next(runs) for _ in own], front, eos if append_eos else None)
        if len(example.input_ids) > max_length:
            if is_dropped(len(example.input_ids), max_length, over_long, path, row.line):
                found.append(None)
                continue
            example = _truncated(example, max_length, path)
        if all(label == IGNORED for label in example.labels[1:]):
            raise DataError(path, row.line, f"nothing to learn is left in its {len(example.input_ids)} tokens")
        found.append(example)
    return found


def is_dropped(length: int, max_length: int, over_long: OverLong, path: str | Path, line: int) -> bool:
    """Whether a row that is too long is left out, not cut off. Raises DataError where neither is wanted."""
    if over_long == "error":
        message = f"expected at most {max_length} tokens, found {length} (--over-long truncate or drop goes on)"
        raise DataError(path, line, message)
    return over_long == "drop"


def none_left(path: str | Path, max_length: int, rows: int) -> DataError:
    """For a file whose rows are all left out."""
    return DataError(path, None, f"expected rows of at most {max_length} tokens, found all {rows} longer")


def _pieces(row: Row, segments: Sequence[Segment], path: str | Path) -> list[list[Segment]]:
    """The row's texts before, between and after its images: a server tokenises each by itself."""
    if row.images is None:
        return [list(segments)]
    pieces: list[list[Segment]] = [[]]
    texts = split_at_images([segment.text for segment in segments], len(row.images), path, row.line)
    for segment, (first, *rest) in zip(segments, texts, strict=True):
        pieces[-1].append(replace(segment, text=first, ends_turn=segment.ends_turn and not rest))
        for i, text in enumerate(rest, start=1):
            pieces.append([replace(segment, text=text, ends_turn=segment.ends_turn and i == len(rest))])
    return pieces


def _truncated(example: Example, max_length: int, path: str | Path) -> Example:
    if any(placed.at > max_length for placed in example.images):
        raise DataError(path, example.line, f"an image would be cut off with what follows token {max_length}")
    ids, labels = example.input_ids[:max_length], example.labels[:max_length]
    return replace(example, input_ids=ids, labels=labels, truncated=True)


def _special_prefix(tokenizer: Any) -> list[int]:
    """The ids a tokenizer puts before any text ([BOS], or nothing). What it puts after a text is left out."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    return []


def _tokenise(rows: Sequence[Sequence[Segment]], tokenizer: Any) -> list[list[list[int]]]:
    """Ids of every segment of every row, in two calls.

    A segment is tokenised together with what precedes it (so that spaces merge as they do in running text) unless
    that would change the preceding tokens; then it is tokenised alone.
    """
    running = ["".join(s.text for s in row[: i + 1]) for row in rows for i in range(len(row))]
    alone = [s.text for row in rows for s in row[1:]]
    running_ids = iter(tokenizer(running, add_special_tokens=False)["input_ids"])
    alone_ids = iter(tokenizer(alone, add_special_tokens=False)["input_ids"] if alone else [])
    return [_split_row(len(row), running_ids, alone_ids) for row in rows]


def _split_row(segments: int, running: Any, alone: Any) -> list[list[int]]:
    parts = [list(next(running))]
    so_far = list(parts[0])
    for _ in range(segments - 1):
        joined, separate = next(running), next(alone)
        tail = joined[len(so_far) :] if joined[: len(so_far)] == so_far else separate
        parts.append(list(tail))
        so_far += tail
    return parts


def _assemble(
    row: Row, pieces: Sequence[Sequence[Segment]], runs: Sequence[Sequence[list[int]]], bos: list[int], eos: int | None
) -> Example:
    ids, labels = list(bos), [IGNORED] * len(bos)
    places: list[int] = []
    for piece, parts in zip(pieces, runs, strict=True):
        for segment, part in zip(piece, parts, strict=True):
            ids += part
            labels += part if segment.learned else [IGNORED] * len(part)
            if segment.ends_turn and eos is not None:
                end = [] if part and part[-1] == eos else [eos]
                ids += end
                labels += end
        places.append(len(ids))  # of the image that follows the piece
    images = row.images or ()
    at = places[:-1] if len(pieces) > 1 else [0] * len(images)
    placed = tuple(PlacedImage(place, image) for place, image in zip(at, images, strict=True))
    return Example(ids, labels, task=row.task, line=row.line, images=placed)
