"""`Engine`: the engine in process for code that knows no asyncio.

with Engine("path/to/model", adapters_root="path/to/adapters") as engine:
    engine.load_adapter("french", "french-lora")
    print(engine.generate("Hello", adapter="french").text)
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from operator import index
from types import TracebackType
from typing import Any, Self, TypeVar, cast, overload

from peftmux.runtime.engine.api import (
    AdapterInfo,
    Classification,
    ClassificationRequest,
    Delta,
    Embedding,
    EmbeddingRequest,
    EngineStats,
    GenerationRequest,
    ModelInfo,
    Pooling,
    WeightedAdapter,
)
from peftmux.runtime.engine.factory import EngineConfig, start_engine
from peftmux.runtime.engine.local import LocalEngine
from peftmux.runtime.engine.observer import NullObserver
from peftmux.runtime.engine.prompts import Prompt, Prompts, is_one, with_adapters
from peftmux.runtime.errors import EngineDead
from peftmux.runtime.params import (
    FinishReason,
    OutputOptions,
    SamplingParams,
    StoppingParams,
    TokenLogprob,
    Usage,
)

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Generation:
    """One finished request."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    adapter_revision: str = ""


class Engine:
    """One base model with its adapters. Any thread may call it; what several threads ask for runs in one batch.

    Errors are those of `peftmux.runtime.errors` and `peftmux.adapters.errors`; EngineDead once it is closed.
    """

    def __init__(self, model: str, *, adapters_root: str | None = None, **settings: Any) -> None:
        """`settings` are the further fields of `EngineConfig`. Returns when the model is loaded."""
        config = EngineConfig(model=model, adapters_root=adapters_root, **settings)
        self._submitting = threading.RLock()
        """Held to hand a call to the loop and to close, so that no call is handed to a loop that has ended.

        The garbage collector may close a stream while its own thread holds it.
        """
        self._closed = False
        self._grace = 0.0
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._serve, args=(config, started), name="peftmux-loop", daemon=True)
        self._thread.start()
        started.result()

    def _serve(self, config: EngineConfig, started: Future[None]) -> None:
        asyncio.run(self._live(config, started))

    async def _live(self, config: EngineConfig, started: Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._leave = asyncio.Event()
        self._room = asyncio.Semaphore(max(1, config.max_queued_requests))
        try:
            self._engine: LocalEngine = await start_engine(config, NullObserver())
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        await self._leave.wait()
        await self._engine.drain(self._grace)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self, grace_seconds: float = 0.0) -> None:
        """End it. Requests of other threads have `grace_seconds` to finish, then they get Draining."""
        with self._submitting:
            if not self._closed:
                self._closed = True
                self._grace = grace_seconds
                self._loop.call_soon_threadsafe(self._leave.set)
        self._thread.join()

    @property
    def info(self) -> ModelInfo:
        return self._engine.info

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids with the tokenizer's special tokens."""
        return self._engine.encode(text)

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """(role, content) pairs through the chat template with the generation prompt. InvalidRequest if it has none."""
        return self._engine.encode_chat(messages)

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        adapter: str = "",
        sampling: SamplingParams | None = None,
        stopping: StoppingParams | None = None,
        output: OutputOptions | None = None,
        task: int | None = None,
        adapters: Sequence[tuple[str, float]] = (),
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: Prompts,
        *,
        adapter: str | Sequence[str] = "",
        sampling: SamplingParams | None = None,
        stopping: StoppingParams | None = None,
        output: OutputOptions | None = None,
        task: int | None = None,
        adapters: Sequence[tuple[str, float]] = (),
    ) -> list[Generation]: ...

    def generate(
        self,
        prompt: Prompt | Prompts,
        *,
        adapter: str | Sequence[str] = "",
        sampling: SamplingParams | None = None,
        stopping: StoppingParams | None = None,
        output: OutputOptions | None = None,
        task: int | None = None,
        adapters: Sequence[tuple[str, float]] = (),
    ) -> Generation | list[Generation]:
        """One prompt, or several in one batch, each with the same adapter or with its own.

        `adapters` are the (name, weight) of a weighted sum instead of one adapter, for each prompt.
        Without `sampling` the tokens are drawn from the model's distribution by a seed that nobody knows. When one of
        several fails, the others are cancelled and its error is raised.
        """
        requests = [
            self._request(one, name, adapters, task, sampling, stopping, output, stream=False)
            for one, name in with_adapters(prompt, adapter)
        ]
        answers = self._ask_all(self._answer, requests)
        return answers[0] if is_one(prompt) else answers

    @overload
    def classify(self, prompt: Prompt, *, adapter: str, task: int | None = None) -> Classification: ...

    @overload
    def classify(
        self, prompt: Prompts, *, adapter: str | Sequence[str], task: int | None = None
    ) -> list[Classification]: ...

    def classify(
        self, prompt: Prompt | Prompts, *, adapter: str | Sequence[str], task: int | None = None
    ) -> Classification | list[Classification]:
        """What the adapter's head says of one prompt, or of several in one batch. TaskMismatch where it has none."""
        requests = [ClassificationRequest(self._ids(one), name, task) for one, name in with_adapters(prompt, adapter)]
        answers = self._ask_all(self._engine.classify, requests)
        return answers[0] if is_one(prompt) else answers

    @overload
    def embed(
        self,
        prompt: Prompt,
        *,
        adapter: str = "",
        pooling: Pooling = Pooling.MEAN,
        normalize: bool = False,
        task: int | None = None,
    ) -> Embedding: ...

    @overload
    def embed(
        self,
        prompt: Prompts,
        *,
        adapter: str | Sequence[str] = "",
        pooling: Pooling = Pooling.MEAN,
        normalize: bool = False,
        task: int | None = None,
    ) -> list[Embedding]: ...

    def embed(
        self,
        prompt: Prompt | Prompts,
        *,
        adapter: str | Sequence[str] = "",
        pooling: Pooling = Pooling.MEAN,
        normalize: bool = False,
        task: int | None = None,
    ) -> Embedding | list[Embedding]:
        """The final hidden states of one prompt, or of several in one batch, pooled over its tokens."""
        requests = [
            EmbeddingRequest(self._ids(one), name, pooling, normalize, task)
            for one, name in with_adapters(prompt, adapter)
        ]
        answers = self._ask_all(self._engine.embed, requests)
        return answers[0] if is_one(prompt) else answers

    def stream(
        self,
        prompt: Prompt,
        *,
        adapter: str = "",
        sampling: SamplingParams | None = None,
        stopping: StoppingParams | None = None,
        output: OutputOptions | None = None,
        task: int | None = None,
        adapters: Sequence[tuple[str, float]] = (),
    ) -> Iterator[Delta]:
        """Deltas as they come; read slowly, they merge. Closing the iterator frees the row within one step."""
        request = self._request(prompt, adapter, adapters, task, sampling, stopping, output, stream=True)
        deltas = cast("AsyncGenerator[Delta]", self._engine.generate(request))
        try:
            while (delta := self._run(_next(deltas))) is not None:
                yield delta
        finally:
            self._close_stream(deltas)

    def load_adapter(
        self,
        name: str,
        source: str,
        *,
        revision: str = "",
        pinned: bool = False,
        wait: bool = True,
        replace: bool = False,
    ) -> AdapterInfo:
        """From a folder under the adapter root."""
        return self._run(
            self._engine.load_adapter(name, source, revision=revision, pinned=pinned, wait=wait, replace=replace)
        )

    def unload_adapter(self, name: str, *, wait: bool = True) -> AdapterInfo:
        return self._run(self._engine.unload_adapter(name, wait=wait))

    def get_adapter(self, name: str) -> AdapterInfo:
        return self._engine.get_adapter(name)

    def list_adapters(self) -> tuple[AdapterInfo, ...]:
        return self._engine.list_adapters()

    def _request(
        self,
        prompt: Prompt,
        adapter: str,
        adapters: Sequence[tuple[str, float]],
        task: int | None,
        sampling: SamplingParams | None,
        stopping: StoppingParams | None,
        output: OutputOptions | None,
        *,
        stream: bool,
    ) -> GenerationRequest:
        return GenerationRequest(
            prompt=self._ids(prompt),
            adapter=adapter,
            sampling=sampling or SamplingParams(seed=secrets.randbits(64)),
            stopping=stopping or StoppingParams(),
            output=output or OutputOptions(),
            stream=stream,
            task=task,
            adapters=tuple(WeightedAdapter(name, weight) for name, weight in adapters),
        )

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        return self.encode(prompt) if isinstance(prompt, str) else tuple(map(index, prompt))

    def _ask_all(self, ask: Callable[[R], Coroutine[Any, Any, T]], requests: Sequence[R]) -> list[T]:
        """In one batch. When one fails, the others are cancelled and its error is raised."""

        async def one(request: R) -> T:
            async with self._room:  # what the queue cannot take waits here
                return await ask(request)

        async def everything() -> list[T]:
            tasks = [asyncio.create_task(one(request)) for request in requests]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        return self._run(everything())

    async def _answer(self, request: GenerationRequest) -> Generation:
        (delta,) = [delta async for delta in self._engine.generate(request)]
        assert delta.finish_reason is not None
        assert delta.usage is not None
        return Generation(
            text=delta.text,
            token_ids=delta.token_ids,
            finish_reason=delta.finish_reason,
            usage=delta.usage,
            logprobs=delta.logprobs,
            prompt_logprobs=delta.prompt_logprobs,
            adapter_revision=delta.adapter_revision,
        )

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it in the loop. An interrupt of the caller cancels it there."""
        future = self._submit(work)
        try:
            return future.result()
        except CancelledError:
            raise EngineDead("the engine was closed") from None
        except BaseException:
            future.cancel()
            raise

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        with self._submitting:
            if not self._closed:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise EngineDead("the engine is closed")

    def _close_stream(self, deltas: AsyncGenerator[Delta]) -> None:
        """In the loop's own thread, where the garbage collector may find a stream that was left, it does not wait."""
        try:
            closing = self._submit(_close(deltas))
        except EngineDead:
            return
        if threading.current_thread() is not self._thread:
            closing.result()


async def _next(deltas: AsyncGenerator[Delta]) -> Delta | None:
    return await anext(deltas, None)


async def _close(deltas: AsyncGenerator[Delta]) -> None:
    await deltas.aclose()
