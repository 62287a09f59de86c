"""`peftmux serve` as its users run it: a process of its own, on the llama fixture with a long context."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peftmux.client import Client

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
START_SECONDS = 180
"""Importing torch on a busy machine takes most of it."""


class Running:
    """One server process, from its ready line on."""

    def __init__(self, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "peftmux.cli.main", "serve", *arguments]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ, encoding="utf-8"
        )
        self.errors: list[str] = []
        threading.Thread(target=self._collect, daemon=True).start()
        watchdog = threading.Timer(START_SECONDS, self.process.kill)
        watchdog.start()
        assert self.process.stdout is not None
        self.ready = self.process.stdout.readline()
        watchdog.cancel()
        found = re.match(r"peftmux ready: grpc (\S+), metrics http://(\S+)/metrics, model .*", self.ready)
        assert found, f"no ready line but {self.ready!r}; stderr: {''.join(self.errors)}"
        self.grpc, self.metrics = found.groups()

    def _collect(self) -> None:
        assert self.process.stderr is not None
        self.errors.extend(self.process.stderr)

    def scrape(self) -> dict[str, float]:
        """Metric lines by name and labels."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def settle(self, **expected: float) -> None:
        """Wait until these metrics have these values."""
        end = time.monotonic() + 10
        while {name: value for name, value in self.scrape().items() if name in expected} != expected:
            assert time.monotonic() < end, f"{expected} never came; last: {self.scrape()}"
            time.sleep(0.05)

    def leave(self, seconds: float) -> int:
        """The exit status after SIGTERM; TimeoutExpired if it takes longer."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


Start = Callable[..., Running]


@pytest.fixture(scope="session")
def long_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama fixture with a context that no test comes to the end of: rotary positions need no weights."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    shutil.copytree(FIXTURES / "base" / "llama", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100_000}))
    return folder


@pytest.fixture(scope="session")
def start(long_base: Path) -> Iterator[Start]:
    """start(*more arguments) -> Running"""
    running: list[Running] = []

    def go(*arguments: str) -> Running:
        adapters = str(FIXTURES / "peft" / "llama")
        ports = ["--grpc", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
        fixed = ["--adapters", adapters, "--dtype", "float32", "--device", "cpu", "--kv-cache-memory", "64MiB"]
        running.append(Running([str(long_base), *ports, *fixed, *arguments]))
        return running[-1]

    yield go
    for server in running:
        server.kill()


@pytest.fixture(scope="session")
def server(start: Start) -> Running:
    """The server that most tests share; each leaves it as it found it."""
    return start("--adapter", f"start={FIXTURES / 'peft' / 'llama' / 'lora_rslora'}")


@pytest.fixture
def client(server: Running) -> Iterator[Client]:
    """Unloads what a test loaded."""
    with Client(server.grpc, timeout=60) as connected:
        yield connected
        for adapter in connected.list_adapters():
            if adapter.name != "start":
                connected.unload_adapter(adapter.name)
