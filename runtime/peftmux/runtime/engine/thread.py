"""The thread that runs steps. Everything else reaches the engine by posting a call to it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

import torch

from peftmux.runtime.engine.core import Deliveries, EngineCore
from peftmux.runtime.errors import EngineDead

logger = logging.getLogger(__name__)

T = TypeVar("T")
_STALLED_SECONDS = 120.0
"""A step that takes longer counts as a dead device."""


class EngineThread:
    """Owns the core's thread. `deliver` is called in it, after each step, with what the step gave."""

    def __init__(self, core: EngineCore, deliver: Callable[[Deliveries], None], num_threads: int | None) -> None:
        self._core = core
        self._deliver = deliver
        self._num_threads = num_threads
        self._calls: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._stopping = False
        self._dead = False
        self._posting = threading.Lock()
        """Held to put a call and to die, so that no call is put that nobody would make."""
        self._step_started: float | None = None
        self._thread = threading.Thread(target=self._run, name="peftmux-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Alive, and not stuck in a step."""
        started = self._step_started
        return not self._dead and (started is None or time.monotonic() - started < _STALLED_SECONDS)

    def post(self, call: Callable[[], object]) -> None:
        """Run `call` in the engine's thread before its next step. EngineDead where it has stopped."""
        with self._posting:
            if self._dead:
                raise EngineDead("the engine has stopped")
            self._calls.put(call)

    def ask(self, call: Callable[[], T]) -> Future[T]:
        """As `post`, with the answer. Cancelled before its turn the call is not made, and from then on it is."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)

        self.post(run)
        return future

    def stop(self, timeout: float | None = None) -> None:
        """End the thread after the step that runs; requests that are left are answered with EngineDead."""
        if self._thread.is_alive():
            self._calls.put(self._stop)
            self._thread.join(timeout)

    def _stop(self) -> None:
        self._stopping = True

    def _run(self) -> None:
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        try:
            while not self._stopping:
                self._turn()
        except Exception:
            logger.critical("the engine has failed", exc_info=True)
        finally:
            with self._posting:
                self._dead = True
            self._answer_last_calls()
            self._core.abort_all(EngineDead("the engine has stopped"))
            self._publish()
            self._core.close()

    def _turn(self) -> None:
        if not self._core.busy:
            self._calls.get()()
        self._answer_calls()
        if self._core.busy and not self._stopping:
            self._step_started = time.monotonic()
            self._core.step()
            self._step_started = None
        self._publish()

    def _answer_calls(self) -> None:
        """Those that wait now: who posts the next call when one is answered does not hold up the next step."""
        for _ in range(self._calls.qsize()):
            self._calls.get_nowait()()

    def _answer_last_calls(self) -> None:
        """None is put any more. One that fails leaves nobody else without an answer."""
        while not self._calls.empty():
            try:
                self._calls.get_nowait()()
            except Exception:
                logger.exception("a call to the engine has failed while it ended")

    def _publish(self) -> None:
        deliveries = self._core.deliveries()
        if deliveries:
            self._deliver(deliveries)
