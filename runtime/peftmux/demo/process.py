"""The server as its users start it: `peftmux serve` in a process of its own, on free ports of the loopback."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from peftmux.client import AsyncClient

READY_SECONDS = 180.0
"""A cold disk under two busy cores; the usual start is a few seconds."""
DRAIN_SECONDS = 40.0
READY = re.compile(r"peftmux ready: grpc (?P<grpc>\S+), metrics http://(?P<metrics>[^/]+)/metrics")


class ServerFailed(RuntimeError):
    """The server did not start or did not leave as it should. Its last words are in the message."""


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers. `metrics` is HOST:PORT."""

    client: AsyncClient
    grpc: str
    metrics: str


@contextlib.asynccontextmanager
async def serving(base: Path, adapters: Path, log: Path) -> AsyncIterator[Running]:
    """Run the server while the block runs, then SIGTERM and wait for its drain. Owns the process.

    Raises ServerFailed when it ends before it is ready, or with another exit status than 0.
    """
    command = [sys.executable, "-m", "peftmux.cli.main", "serve", str(base), "--adapters", str(adapters)]
    options = ["--grpc", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--dtype", "float32"]
    with open(log, "wb") as errors:
        process = await asyncio.create_subprocess_exec(*command, *options, stdout=PIPE, stderr=errors)
        try:
            grpc, metrics = await _addresses(process, log)
            async with AsyncClient(grpc, timeout=120.0) as client:
                yield Running(client, grpc, metrics)
        finally:
            status = await _leave(process)
    if status != 0:
        raise ServerFailed(f"expected the server to leave with status 0, got {status}\n{_tail(log)}")


async def _addresses(process: asyncio.subprocess.Process, log: Path) -> tuple[str, str]:
    """gRPC and metrics HOST:PORT from the server's ready line."""
    assert process.stdout is not None
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), READY_SECONDS)).decode()
    except TimeoutError:
        raise ServerFailed(f"the server was not ready after {READY_SECONDS:g} s\n{_tail(log)}") from None
    found = READY.match(line)
    if not found:
        raise ServerFailed(f"expected the server's ready line, got {line!r}\n{_tail(log)}")
    return found["grpc"], found["metrics"]


async def _leave(process: asyncio.subprocess.Process) -> int:
    if process.returncode is None:
        process.terminate()
    try:
        return await asyncio.wait_for(process.wait(), DRAIN_SECONDS)
    except TimeoutError:
        process.kill()
        return await process.wait()


def _tail(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
