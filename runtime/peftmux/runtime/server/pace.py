"""How often a stream sends while many run: merging tokens leaves the processor to the engine."""

from __future__ import annotations

import asyncio


class Pace:
    """Spaces the messages of one stream by a time that grows with the number of streams.

    A message costs some 35 us of this process whatever it carries, most of it under the interpreter lock that the
    engine needs. With n streams each waits n * `cost` seconds between messages, at most `ceiling`: sending takes a few
    percent of a core, and no reader waits longer than `ceiling` for a token that is there. Meanwhile the engine merges
    what it makes. Up to `free` streams nothing waits.
    """

    def __init__(self, cost: float = 0.001, free: int = 4, ceiling: float = 0.05) -> None:
        self.active = 0
        """Streams now; each adds itself and takes itself away."""
        self._cost = cost
        self._free = free
        self._ceiling = ceiling

    def interval(self) -> float:
        """Seconds between two messages of a stream."""
        return min(self._ceiling, self.active * self._cost) if self.active > self._free else 0.0

    async def wait(self) -> None:
        interval = self.interval()
        if interval:
            await asyncio.sleep(interval)
