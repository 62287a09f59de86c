"""Regular expressions out of an adapter's config: foreign code of a kind, so matched with a limit on time.

PEFT matches them with Python's `re`, which cannot be interrupted and holds the interpreter meanwhile: `(a+)+$` would
stop the server. Here `re` checks the syntax and `regex`, which understands the same one, matches.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Any, Literal

import regex

from peftmux.adapters.errors import AdapterInvalid, Reason

MAX_PATTERN = 16_384
_PLAIN = re.compile(r"[\w.-]+")


class PatternMatcher:
    """Matches one config's patterns within one budget of `seconds`."""

    def __init__(self, seconds: float = 0.25) -> None:
        self._deadline = time.monotonic() + seconds
        self._compiled: dict[str, Any] = {}
        self._plain: dict[str, bool] = {}

    def full(self, field: str, pattern: str, name: str) -> bool:
        """PEFT's rule for target_modules and exclude_modules as a string: the whole name."""
        return self._run(field, pattern, name, "fullmatch") is not None

    def first_key(self, field: str, keys: Iterable[str], name: str) -> str | None:
        """PEFT's rule for rank_pattern and alpha_pattern: the first key that matches the name from some dot on."""
        for key in keys:
            if key not in self._plain:
                self._plain[key] = _PLAIN.fullmatch(key) is not None
            if _ends_with(name, key) if self._plain[key] else self._run(field, rf"(.*\.)?({key})$", name, "match"):
                return key
        return None

    def layer_index(self, field: str, patterns: list[str], name: str) -> int | None:
        """PEFT's rule for layers_pattern: the first number after `pattern.`; with no pattern, after any two names."""
        wanted = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        for pattern in wanted:
            if match := self._run(field, pattern, name, "match"):
                return int(match.group("idx"))
        return None

    def _run(self, field: str, pattern: str, name: str, how: Literal["match", "fullmatch"]) -> Any:
        remaining = self._deadline - time.monotonic()
        try:
            if remaining <= 0:
                raise TimeoutError
            return getattr(self._compile(field, pattern), how)(name, timeout=remaining, concurrent=True)
        except TimeoutError:
            raise AdapterInvalid(Reason.INVALID_FIELD, f"field {field}: its patterns take too long to match") from None

    def _compile(self, field: str, pattern: str) -> Any:
        if pattern not in self._compiled:
            if len(pattern) > MAX_PATTERN:
                raise AdapterInvalid(
                    Reason.INVALID_FIELD,
                    f"field {field}: expected at most {MAX_PATTERN} characters, got {len(pattern)}",
                )
            try:
                re.compile(pattern)
                self._compiled[pattern] = regex.compile(pattern)
            except (re.error, regex.error, ValueError, OverflowError, RecursionError) as error:
                raise AdapterInvalid(
                    Reason.INVALID_FIELD, f"field {field}: {pattern[:80]!r} is not a regular expression ({error})"
                ) from None
        return self._compiled[pattern]


def _ends_with(name: str, key: str) -> bool:
    """`first_key`'s rule for a key of names and dots, where a dot still stands for any one character."""
    start = len(name) - len(key)
    if start < 0 or (start > 0 and name[start - 1] != "."):
        return False
    return all(k in (".", c) for k, c in zip(key, name[start:], strict=True))
