"""Text to token ids and back, for a model that may have no tokenizer or chat template."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from peftmux.runtime.engine.detokenize import Detokenizer
from peftmux.runtime.engine.request import NoText, TextStream
from peftmux.runtime.errors import InvalidRequest
from peftmux.runtime.params import StoppingParams


class Text:
    """Any thread may call it: one lock guards the tokenizer, whose fast form keeps mutable settings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    def encode(self, text: str) -> tuple[int, ...]:
        with self._lock:
            return tuple(self._need("input").encode(text))

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        return self._encode_plain(self._render(messages))

    def encode_around(self, text: str | Sequence[tuple[str, str]], marker: str) -> tuple[tuple[int, ...], ...]:
        """The pieces of a text or chat between the markers, each encoded; a text's first with the special tokens."""
        rendered = text if isinstance(text, str) else self._render(text)
        first, *rest = rendered.split(marker)
        head = self.encode(first) if isinstance(text, str) else self._encode_plain(first)
        return (head, *(self._encode_plain(piece) for piece in rest))

    def _encode_plain(self, text: str) -> tuple[int, ...]:
        with self._lock:
            return tuple(self._need("input").encode(text, add_special_tokens=False)) if text else ()

    def _render(self, messages: Sequence[tuple[str, str]]) -> str:
        tokenizer = self._need("chat")
        if tokenizer.chat_template is None:
            raise InvalidRequest("chat", "expected text or token_ids: the tokenizer of this model has no chat template")
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            with self._lock:
                return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program of its own; what it raises is about the messages
            raise InvalidRequest("chat", f"the chat template refused the messages: {error}") from error

    def pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        with self._lock:
            pieces = self._need("input").convert_ids_to_tokens(list(ids))
        return tuple("" if p is None else str(p) for p in pieces)

    def stream(self, stopping: StoppingParams) -> TextStream:
        """A detokeniser for one request."""
        if self._tokenizer is None:
            if stopping.stop:
                raise InvalidRequest("stopping.stop", "expected none: this model has no tokenizer")
            return NoText()
        return Detokenizer(self._tokenizer, stopping.stop, stopping.min_tokens)

    def _need(self, field: str) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            raise InvalidRequest(field, "expected token_ids: this model has no tokenizer")
        return self._tokenizer
