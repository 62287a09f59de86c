"""Token ids to text as they come: whole characters only, and nothing of a stop string.

The pieces of a stream, put together, are what the tokenizer decodes from all the ids at once, special tokens left out.
(`clean_up_tokenization_spaces` is not applied: it is meant for WordPiece and eats spaces that a model has written.)
Each id is decoded a bounded number of times, however long the output grows.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
_LONGEST_HOLD = 8
"""Tokens that a window waits for the rest of a character, in tokenizers whose bytes are not known here."""


class Detokenizer:
    """The text of one request. Not thread-safe.

    The prompt lends no context: the text equals `decode` of the generated ids, which is what a client can check.
    Stop strings are looked for behind the first `min_tokens` tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
    ) -> None:
        self._text = _stream(_vocabulary(tokenizer))
        self._stop = _StopStrings(stop)
        self._free = min_tokens
        """Tokens still to come that cannot stop."""

    def push(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        """New text that is certain, and whether a stop string has been found: the text then ends before it.

        Of several stop strings the one that is complete first counts, so that the answer does not depend on how the
        tokens are handed over. After a stop nothing follows.
        """
        free = "".join([self._text.push(token) for token in token_ids[: self._free]])
        text, stopped = self._stop.push("".join([self._text.push(token) for token in token_ids[self._free :]]))
        self._free = max(0, self._free - len(token_ids))
        return free + text, stopped

    def finish(self) -> str:
        """What was held back: the beginning of a stop string, a character whose end never came (as U+FFFD)."""
        text, _ = self._stop.push(self._text.finish())
        return text + self._stop.finish()


class _Stream(Protocol):
    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


class _Vocabulary:
    """What streaming must know of a tokenizer, found out once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._backend = backend
        decoder = backend.decoder if backend is not None else None
        kinds = _decoder_kinds(json.loads(decoder.__getstate__())) if decoder is not None else []
        self.is_byte_level = kinds == ["ByteLevel"]
        self.special = frozenset(self._special_ids())
        self.fallback_bytes = frozenset(self._fallback_ids() if "ByteFallback" in kinds else ())
        """Ids of tokens that stand for one byte each; how they decode depends on the whole run of them."""

    def _special_ids(self) -> list[int]:
        if self._backend is None:
            return list(self._tokenizer.all_special_ids)
        return [id for id, token in self._backend.get_added_tokens_decoder().items() if token.special]

    def _fallback_ids(self) -> list[int]:
        names = [f"<0x{byte:02{case}}>" for byte in range(256) for case in "Xx"]
        return [id for name in names if (id := self._backend.token_to_id(name)) is not None]

    def piece(self, token: int) -> str | None:
        """None for an id that has no text: special, or not in the vocabulary."""
        if token in self.special:
            return None
        if self._backend is None:
            piece = self._tokenizer.convert_ids_to_tokens(token)
            return piece if isinstance(piece, str) else None
        found: str | None = self._backend.id_to_token(token)
        return found

    def decode(self, tokens: list[int]) -> str:
        if self._backend is None:
            return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return str(self._backend.decode(tokens, skip_special_tokens=True))


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> _Vocabulary:
    return _Vocabulary(tokenizer)


def _decoder_kinds(state: dict[str, Any]) -> list[str]:
    if state["type"] == "Sequence":
        return [kind for inner in state["decoders"] for kind in _decoder_kinds(inner)]
    return [state["type"]]


def _stream(vocabulary: _Vocabulary) -> _Stream:
    return _ByteLevelStream(vocabulary) if vocabulary.is_byte_level else _WindowStream(vocabulary)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's bijection of bytes to printable characters: Latin-1's printable ones stand for themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_level_alphabet()


class _ByteLevelStream:
    """Pieces are bytes: UTF-8 is decoded incrementally, an incomplete character waits."""

    def __init__(self, vocabulary: _Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        piece = self._vocabulary.piece(token)
        if piece is None:
            return ""
        try:
            return self._utf8.decode(bytes([_BYTES[character] for character in piece]))
        except KeyError:  # an added token, kept as it is written
            return self._utf8.decode(piece.encode())

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowStream:
    """Any other decoder: what new tokens add behind the last ones that added something.

    Decoders treat the first piece of a text apart (no space before it). `_context`, the tokens of the last text given
    out, takes that place, so that new tokens decode as they do in the middle.
    """

    def __init__(self, vocabulary: _Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        if self._vocabulary.piece(token) is None:
            return ""
        self._pending.append(token)
        if token in self._vocabulary.fallback_bytes:
            return ""
        text = self._new_text()
        if not text or (text.endswith(_REPLACEMENT) and len(self._pending) < _LONGEST_HOLD):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def _new_text(self) -> str:
        before = self._vocabulary.decode(self._context) if self._context else ""
        return self._vocabulary.decode(self._context + self._pending)[len(before) :]

    def finish(self) -> str:
        text = self._new_text() if self._pending else ""
        self._pending = []
        return text


class _Pattern:
    """One stop string, matched character by character (Knuth, Morris, Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        """Characters at the end of what was read that begin the string; its length once it is complete."""
        self._borders = [0]
        for character in text[1:]:
            self._borders.append(self._extend(self._borders[-1], character))

    def _extend(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self.text[matched] == character)

    def read(self, character: str) -> bool:
        self.matched = self._extend(self.matched, character)
        return self.matched == len(self.text)


class _StopStrings:
    """Passes text on up to the first match, holding back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        if not all(stop):
            raise ValueError(f"expected stop strings of at least one character, got {list(stop)}")
        self._patterns = [_Pattern(text) for text in stop]
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        if self._stopped or not self._patterns:
            return ("" if self._stopped else text), self._stopped
        buffer = self._held + text
        for end, character in enumerate(text, len(self._held) + 1):
            complete = [len(p.text) for p in self._patterns if p.read(character)]
            if complete:
                self._stopped, self._held = True, ""
                return buffer[: end - max(complete)], True
        keep = len(buffer) - max(p.matched for p in self._patterns)
        self._held = buffer[keep:]
        return buffer[:keep], False

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held
