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
        tokenizer = self._need("chat")
        if tokenizer.chat_template is None:
            raise InvalidRequest("chat", "expected text or token_ids: the tokenizer of this model has no chat template")
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            with self._lock:
                rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
                return tuple(tokenizer.encode(rendered, add_special_tokens=False))
        except Exception as error:  # a template is a program of its own; what it raises is about the messages
            raise InvalidRequest("chat", f"the chat template refused the messages: {error}") from error

    def pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        with self._lock:
            pieces = self._need("input").convert_ids_to_tokens(list(ids))
        return tuple("" if p is None else str(p) for p in pieces)

    def stream(self, prompt: Sequence[int], stopping: StoppingParams) -> TextStream:
        """A detokeniser for one request."""
        if self._tokenizer is None:
            if stopping.stop:
                raise InvalidRequest("stopping.stop", "expected none: this model has no tokenizer")
            return NoText()
        return Detokenizer(self._tokenizer, prompt, stopping.stop, stopping.min_tokens)

    def _need(self, field: str) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            raise InvalidRequest(field, "expected token_ids: this model has no tokenizer")
        return self._tokenizer
