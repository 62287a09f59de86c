"""Where an asyncio task waits for its request's deltas. Lives in the loop's thread only."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from peftmux.runtime.engine.api import Delta
from peftmux.runtime.engine.request import Outcome
from peftmux.runtime.errors import RuntimeFailure


class Mailbox:
    """Deltas that nobody has taken yet merge into one: a slow reader loses nothing and holds nobody up."""

    def __init__(self) -> None:
        self._delta: Delta | None = None
        self._failure: RuntimeFailure | None = None
        self._news = asyncio.Event()
        self.over = False
        """Nothing more comes: the request has ended."""

    def put(self, outcome: Outcome) -> None:
        if isinstance(outcome, RuntimeFailure):
            self._failure = outcome
            self.over = True
        else:
            self.over = outcome.finish_reason is not None
            self._delta = outcome if self._delta is None else _merge(self._delta, outcome)
        self._news.set()

    async def get(self) -> Delta:
        """The next delta. Raises the request's failure, after the deltas before it."""
        await self._news.wait()
        if self._delta is not None:
            delta, self._delta = self._delta, None
            if self._failure is None:
                self._news.clear()
            return delta
        assert self._failure is not None
        raise self._failure


def _merge(first: Delta, second: Delta) -> Delta:
    return replace(
        second,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        prompt_logprobs=first.prompt_logprobs + second.prompt_logprobs,
        states=first.states + second.states,
    )
