"""An engine's core over one model, driven step by step: what a step costs with scheduling, sampling and bookkeeping."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.engine_adapters import random_adapter
from benchmarks.engine_model import Shape, synchronize
from peftmux.runtime.engine.api import GenerationRequest
from peftmux.runtime.engine.core import EngineCore
from peftmux.runtime.engine.observer import NullObserver
from peftmux.runtime.engine.placement import DevicePlacement, Placed, prepare
from peftmux.runtime.engine.request import ActiveRequest, NoText, Outcome
from peftmux.runtime.errors import RuntimeFailure, StepFailed
from peftmux.runtime.model.graphs import decode_graphs
from peftmux.runtime.model.loaded import LoadedModel
from peftmux.runtime.model.runner import Runner
from peftmux.runtime.params import SamplingParams, StoppingParams
from peftmux.runtime.residency.store import Revision
from peftmux.runtime.scheduler import Scheduler

Adapter = Revision[Placed]
_BLOCK = 16
_WARM_STEPS = 3


@dataclass(frozen=True, slots=True)
class Decoded:
    """Steps of one token a row."""

    step_seconds: float
    contexts: int
    """Tokens in the cache that the rows of the middle step see, together."""
    replayed: bool
    """Out of a captured graph, all of them."""


class Session:
    """Owns the engine's core and the adapters placed on the device."""

    def __init__(self, model: LoadedModel, shape: Shape, max_rows: int, steps: int) -> None:
        self.model = model
        self._shape = shape
        self._steps = steps
        row = shape.prompt + shape.prefix + self._new_tokens(max_rows)
        decoding = max_rows * (-(-row // _BLOCK) + 1)
        prefilling = -(-(shape.prefill + 1) // _BLOCK) + 1
        blocks = decoding + prefilling + 64 * (-(-shape.prefix // _BLOCK)) + 1
        tokens = max(shape.prefill, max_rows)
        scheduler = Scheduler(blocks, _BLOCK, tokens, max_rows, prefix_caching=False)
        self.graphs = decode_graphs(model, max_rows, tokens, _BLOCK, lambda: None)
        runner = Runner(model, blocks, _BLOCK, self.graphs)
        self._placement = DevicePlacement(scheduler, runner, None)
        self._core = EngineCore(
            scheduler, runner, NullObserver(), lambda active: None, max_rows, ahead=model.device.type == "cuda"
        )
        self._adapters: dict[tuple[str, int, int], Adapter] = {}
        self._random = random.Random(0)
        self._next = 0

    def adapters(self, kinds: Sequence[str], count: int) -> list[Adapter]:
        """`count` different ones, of these kinds and the shape's ranks in turn; made once each."""
        ranks = self._shape.ranks
        return [self._adapter(kinds[i % len(kinds)], ranks[i % len(ranks)], i) for i in range(count)]

    def _adapter(self, kind: str, rank: int, seed: int) -> Adapter:
        key = (kind, rank, seed)
        if key not in self._adapters:
            lowered = random_adapter(self.model, kind, rank, self._shape.prefix, seed)
            prepared = prepare(self.model, lowered, _BLOCK)
            placed = self._placement.place(lowered.digest, prepared)
            self._adapters[key] = Revision(
                f"{kind}-{rank}-{seed}", lowered.digest, kind, (rank, rank), 0, 0, 0, prepared.size, placed
            )
        return self._adapters[key]

    def warm_up(self) -> None:
        """Compile and capture what can be before anything is timed."""
        self._core.warm_up()

    def abandon(self) -> None:
        """End the rows that are left."""
        self._core.abort_all(StepFailed("the scenario is over"))
        self._core.deliveries()

    def decode(self, adapters: Sequence[Adapter | None]) -> Decoded:
        """One row for each entry; None is the base. What is left of the rows is given up."""
        rows = [self._add(adapter, self._shape.prompt, self._new_tokens(len(adapters))) for adapter in adapters]
        while any(row.generated < 1 for row in rows):
            self._step()
        for _ in range(_WARM_STEPS):
            self._step()
        prefixes = [a.placement.prefixes[0].length if a and a.placement.prefixes else 0 for a in adapters]
        own = sum(self._shape.prompt + row.generated + self._steps // 2 for row in rows)
        replays = self.graphs.replays if self.graphs else 0
        started = self._now()
        for _ in range(self._steps):
            self._step()
        seconds = (self._now() - started) / self._steps
        replayed = self.graphs is not None and self.graphs.replays - replays == self._steps
        self.abandon()
        return Decoded(seconds, own + sum(prefixes), replayed)

    def _new_tokens(self, rows: int) -> int:
        """That a row may generate: the first ones decode while the last ones' prompts are computed."""
        prefills = -(-rows * self._shape.prompt // max(self._shape.prefill - rows, 1))
        return prefills + 1 + _WARM_STEPS + self._steps + 2

    def prefill(self, adapters: Sequence[Adapter | None]) -> float:
        """Seconds of one step that computes the shape's prefill tokens, shared out over a row for each entry."""
        best = float("inf")
        for _ in range(_WARM_STEPS):
            for adapter in adapters:
                self._add(adapter, self._shape.prefill // len(adapters), 1)
            started = self._now()
            while self._core.busy:
                self._step()
            best = min(best, self._now() - started)
        return best

    def generate(self, rows: int, new_tokens: int) -> float:
        """Tokens a second of base rows from their arrival to their last token."""
        started = self._now()
        for _ in range(rows):
            self._add(None, self._shape.prompt, new_tokens)
        while self._core.busy:
            self._step()
        return rows * new_tokens / (self._now() - started)

    def prompt(self, tokens: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(3, self._shape.vocabulary) for _ in range(tokens))

    def _add(self, adapter: Adapter | None, prompt: int, new_tokens: int) -> ActiveRequest:
        tokens = self.prompt(prompt)
        request = GenerationRequest(
            tokens,
            sampling=SamplingParams(temperature=0.0),
            stopping=StoppingParams(max_tokens=new_tokens, ignore_eos=True),
            stream=False,
        )
        self._next += 1
        active = ActiveRequest(
            self._next, request, tokens, adapter, NoText(), frozenset(), new_tokens, lambda outcome: None
        )
        self._core.add(active)
        return active

    def _step(self) -> None:
        self._core.step()
        for _, outcome in self._core.deliveries():
            _check(outcome)

    def _now(self) -> float:
        synchronize(self.model.device)
        return time.perf_counter()


def _check(outcome: Outcome) -> None:
    if isinstance(outcome, RuntimeFailure):
        raise outcome
