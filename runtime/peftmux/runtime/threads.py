"""Threads that leave no OpenMP team behind.

A thread that has run one parallel torch operation keeps a team of workers until it ends. Once teams outnumber the
cores, libgomp stops spinning between parallel regions, in every team: measured, a third more time for each step. So
only the engine's thread lives on; whatever else computes does it in a thread that ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_own_thread(work: Callable[[], T], name: str) -> Future[T]:
    """Run `work` in a new thread that ends with it."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except StopIteration as error:  # which asyncio cannot pass on: whoever waits would wait for ever
            future.set_exception(RuntimeError("StopIteration in a thread").with_traceback(error.__traceback__))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
