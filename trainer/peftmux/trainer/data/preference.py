"""Rows for preference losses: each becomes two sequences that are scored together.

DPO: a prompt with the chosen and with the rejected completion. KTO: a prompt with its completion, and with that of
another row, from which the divergence is estimated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftmux.trainer.data.collate import PaddingCollator
from peftmux.trainer.data.encode import EncodedData, Example, OverLong, encode_each, none_left
from peftmux.trainer.data.rows import Row
from peftmux.trainer.errors import DataError

REFERENCE = "reference"
"""Log-probabilities of both sequences under the base model alone, [B, 2]."""
DESIRABLE = "desirable"
"""KTO: whether the completion is, [B] bool."""


@dataclass(frozen=True, slots=True)
class EncodedPairs(EncodedData):
    """`examples` holds the two sequences of each row side by side."""

    desirable: tuple[bool, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.examples) // 2

    def features(self) -> list[dict[str, Any]]:
        """Of each row both sequences, and what the Trainer's samplers look at; the references are not in yet."""
        found: list[dict[str, Any]] = []
        for i in range(self.rows):
            pair = self.examples[2 * i : 2 * i + 2]
            longest = max(pair, key=lambda e: len(e.input_ids))
            found.append({"pair": [example.feature() for example in pair], "input_ids": longest.input_ids})
            if self.desirable:
                found[-1][DESIRABLE] = self.desirable[i]
        return found


def encode_preferences(
    rows: Sequence[Row],
    tokenizer: Any,
    path: str | Path,
    *,
    max_length: int,
    over_long: OverLong = "error",
    append_eos: bool = True,
) -> EncodedPairs:
    """Rows of one preference loss as pairs; a row is dropped with both of its sequences. Raises DataError as
    `encode_rows`, and for KTO where fewer than two rows are left."""
    loss = rows[0].format

    def encode(wanted: Sequence[Row], how: OverLong) -> list[Example | None]:
        return encode_each(wanted, tokenizer, path, max_length=max_length, over_long=how, append_eos=append_eos)

    first = encode([_asked(row, row.fields["chosen" if loss == "dpo" else "completion"]) for row in rows], over_long)
    if loss == "dpo":
        second = encode([_asked(row, row.fields["rejected"]) for row in rows], over_long)
        kept = [i for i, pair in enumerate(zip(first, second, strict=True)) if None not in pair]
    else:
        kept = [i for i, example in enumerate(first) if example is not None]
        if len(kept) < 2:
            raise DataError(path, None, f"expected at least 2 rows of at most {max_length} tokens, found {len(kept)}")
        others = _others([rows[i] for i in kept])
        second = [None] * len(rows)
        for i, other in zip(kept, encode(others, "truncate"), strict=True):
            second[i] = other
    if not kept:
        raise none_left(path, max_length, len(rows))
    examples = [example for i in kept for example in (first[i], second[i]) if example is not None]
    own = [first] if loss == "kto" else [first, second]
    truncated = sum(any(example is not None and example.truncated for example in (o[i] for o in own)) for i in kept)
    desirable = tuple(bool(rows[i].fields["label"]) for i in kept) if loss == "kto" else ()
    return EncodedPairs(examples, loss, truncated, len(rows) - len(kept), desirable)


def _asked(row: Row, completion: object) -> Row:
    return Row(row.line, "prompt-completion", {"prompt": row.fields["prompt"], "completion": completion})


def _others(rows: Sequence[Row]) -> list[Row]:
    """Each prompt with the completion of the next row, in a circle, that has another prompt (or of any other row)."""
    prompts, n = [row.fields["prompt"] for row in rows], len(rows)
    others: list[int | None] = [None] * n
    for i in reversed(range(2 * n)):  # twice around: the last rows' next ones are the first
        here, after = i % n, (i + 1) % n
        others[here] = after if prompts[after] != prompts[here] else others[after]
    found = [(i + 1) % n if other is None else other for i, other in enumerate(others)]
    return [_asked(row, rows[other].fields["completion"]) for row, other in zip(rows, found, strict=True)]


@dataclass(frozen=True, slots=True)
class PreferenceCollator:
    """B rows give 2 B sequences, pair by pair, padded as `inner` does, with what the loss needs of them."""

    inner: PaddingCollator

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.inner([sequence for feature in features for sequence in feature["pair"]])
        batch[REFERENCE] = torch.tensor([feature[REFERENCE] for feature in features])
        if DESIRABLE in features[0]:
            batch[DESIRABLE] = torch.tensor([feature[DESIRABLE] for feature in features])
        return batch
