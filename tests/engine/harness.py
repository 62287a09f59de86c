"""What tests of a whole engine share: start one over a fixture base, ask it, and collect what it answers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from peftmux.runtime.engine.api import AdapterInfo, Delta, GenerationRequest, WeightedAdapter
from peftmux.runtime.engine.factory import EngineConfig, start_engine
from peftmux.runtime.engine.local import LocalEngine
from peftmux.runtime.engine.observer import EngineObserver, NullObserver
from peftmux.runtime.model.launched import Launched
from peftmux.runtime.params import (
    FinishReason,
    OutputOptions,
    SamplingParams,
    StoppingParams,
    TokenLogprob,
    Usage,
)
from peftmux.runtime.scheduler import StepPlan

FIXTURES = Path(__file__).parent.parent / "fixtures"


def base(name: str = "llama") -> str:
    return str(FIXTURES / "base" / name)


def adapters(name: str = "llama") -> str:
    """The adapter root of that base's PEFT folders."""
    return str(FIXTURES / "peft" / name)


@asynccontextmanager
async def running(
    name: str = "llama", *, observer: EngineObserver | None = None, **settings: Any
) -> AsyncIterator[LocalEngine]:
    """An engine over a fixture base in float32, drained at the end."""
    settings = {"adapters_root": adapters(name), "dtype": "float32", "num_threads": 1, **settings}
    engine = await start_engine(EngineConfig(model=base(name), **settings), observer or NullObserver())
    try:
        yield engine
    finally:
        await engine.drain(0.0)


@dataclass(slots=True)
class Answer:
    """All deltas of one request, put together."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str = ""
    deltas: int = 0
    finish: FinishReason | None = None
    usage: Usage | None = None
    revision: str = ""

    def add(self, delta: Delta) -> None:
        assert self.finish is None, "a delta came after the last"
        self.ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        self.text += delta.text
        self.deltas += 1
        self.finish, self.usage = delta.finish_reason, delta.usage
        self.revision = delta.adapter_revision

    @property
    def values(self) -> list[float]:
        """Log-probabilities of the generated tokens."""
        return [cast("float", entry.logprob) for entry in self.logprobs]

    @property
    def cached(self) -> int:
        assert self.usage is not None
        return self.usage.cached_tokens


def request(
    ids: Iterable[int],
    adapter: str = "",
    max_tokens: int | None = 6,
    *,
    sampling: SamplingParams | None = None,
    prompt_logprobs: int | None = None,
    logprobs: int | None = 0,
    ignore_eos: bool = True,
    stream: bool = True,
    deadline: float | None = None,
    priority: int = 0,
    task: int | None = None,
    adapters: Sequence[tuple[str, float]] = (),
    **stopping: Any,
) -> GenerationRequest:
    """Greedy and past end tokens unless told otherwise."""
    return GenerationRequest(
        prompt=tuple(ids),
        adapter=adapter,
        sampling=sampling or SamplingParams(temperature=0.0),
        stopping=StoppingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, **stopping),
        output=OutputOptions(logprobs=logprobs, prompt_logprobs=prompt_logprobs),
        priority=priority,
        deadline=deadline,
        stream=stream,
        task=task,
        adapters=tuple(WeightedAdapter(name, weight) for name, weight in adapters),
    )


def opened(engine: LocalEngine, wanted: GenerationRequest) -> aclosing[AsyncGenerator[Delta]]:
    """The stream of deltas, closed at the end of the block."""
    return aclosing(cast("AsyncGenerator[Delta]", engine.generate(wanted)))


async def ask(engine: LocalEngine, wanted: GenerationRequest) -> Answer:
    answer = Answer()
    async for delta in engine.generate(wanted):
        answer.add(delta)
    assert answer.finish is not None, "the stream ended without a reason"
    return answer


async def ask_all(engine: LocalEngine, wanted: Sequence[GenerationRequest]) -> list[Answer]:
    """All in one batch."""
    return list(await asyncio.gather(*(ask(engine, one) for one in wanted)))


async def load(engine: LocalEngine, source: str, name: str = "", **settings: Any) -> AdapterInfo:
    return await engine.load_adapter(name or source, source, **settings)


async def in_engine_thread(engine: LocalEngine, call: Any) -> Any:
    """What `call` returns between two steps."""
    return await asyncio.wrap_future(engine._thread.ask(call))


async def check_quiet(engine: LocalEngine, usage: float = 0.0) -> None:
    """Nothing runs or waits, no block or lease is lost, and the cache is as used as it was."""
    await in_engine_thread(engine, engine._core.scheduler.check)
    stats = engine.stats()
    assert (stats.running, stats.waiting, engine._open) == (0, 0, 0)
    assert stats.kv_cache_usage == usage
    assert all(adapter.requests_in_flight == 0 for adapter in stats.adapters)


class StepGate:
    """Stands around an engine's runner: counts steps, and holds them or makes them fail on demand."""

    def __init__(self, engine: LocalEngine) -> None:
        self._runner = engine._core._runner
        self._launch = self._runner.launch
        self._open = threading.Event()
        self._open.set()
        self.entered = 0
        self.failures: list[Exception] = []
        """Raised by the next steps, one each."""
        self._runner.launch = self._gated  # type: ignore[method-assign]

    def _gated(self, plan: StepPlan, before: Launched | None = None) -> Launched:
        self.entered += 1
        self._open.wait(30)
        if self.failures:
            raise self.failures.pop(0)
        return self._launch(plan, before)

    def hold(self) -> None:
        """The next step waits at its beginning, and with it all that comes after."""
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    async def step_begins(self) -> None:
        """Returns when a step that was not under way is at the gate."""
        before = self.entered
        await until(lambda: self.entered > before)

    def remove(self) -> None:
        self.release()
        self._runner.launch = self._launch  # type: ignore[method-assign]


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)
