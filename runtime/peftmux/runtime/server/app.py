"""The server: one engine behind one gRPC port and one metrics port, and the way it leaves."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc.aio
from prometheus_client import CollectorRegistry

from peftmux.runtime.engine.api import AsyncEngine, EngineStats
from peftmux.runtime.server.adapters import AdapterService
from peftmux.runtime.server.auth import TokenInterceptor, Tokens
from peftmux.runtime.server.guard import MAX_MESSAGE_BYTES, Guard
from peftmux.runtime.server.inference import InferenceService
from peftmux.runtime.server.metrics import EngineMetrics, RpcMetrics
from peftmux.runtime.server.pace import Pace
from peftmux.runtime.server.scrape import EngineCollector, MetricsPort
from peftmux.runtime.server.tls import TlsFiles
from peftmux.v1 import adapters_pb2, inference_pb2

if TYPE_CHECKING:
    from peftmux.runtime.server.standard import Health

logger = logging.getLogger(__name__)

_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
_ADAPTERS = adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"]
_LAST_WORDS = 0.5
"""Seconds for statuses to reach the clients after the last request has ended."""
_OPTIONS = [
    ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a rival
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),  # prompt_logprobs of a long prompt; the request bounds it
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
]


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Addresses are HOST:PORT, port 0 takes a free one."""

    grpc: str = "127.0.0.1:50051"
    metrics: str | None = "127.0.0.1:9464"
    grace_seconds: float = 30.0
    """What running requests have to finish in after SIGTERM."""
    tls: TlsFiles | None = None
    tokens: Tokens | None = None
    max_loras: int | None = None
    """Told to routers as `max_lora`; nothing else depends on it."""
    standard_services: bool = True
    """Health and reflection; off where their packages cannot be installed."""


class ServerMetrics:
    """Made before the engine, which reports to `engine`, and before the server.

    `adapter_labels` adapters have a label of their own; the others share "other".
    """

    def __init__(self, adapter_labels: int = 50) -> None:
        self.adapter_labels = adapter_labels
        self.registry = CollectorRegistry()
        self.engine = EngineMetrics(self.registry, adapter_labels)
        self.rpcs = RpcMetrics(self.registry)


class Server:
    """Lives in one asyncio loop, the engine's. Built, started once, drained once."""

    def __init__(self, engine: AsyncEngine, metrics: ServerMetrics, config: ServerConfig) -> None:
        self._engine = engine
        self._metrics = metrics
        self._config = config
        self._guard = Guard(metrics.rpcs)
        self._port: MetricsPort | None = None
        interceptors = [] if config.tokens is None else [TokenInterceptor(config.tokens, metrics.rpcs)]
        self._server = grpc.aio.server(interceptors=interceptors, options=_OPTIONS)
        inference = InferenceService(engine, Pace())
        self._server.add_generic_rpc_handlers(
            (
                self._guard.handlers(_INFERENCE, inference.methods()),
                self._guard.handlers(_ADAPTERS, AdapterService(engine).methods()),
            )
        )
        self._health = _health(self._server, engine) if config.standard_services else None
        self.grpc_address = ""
        """HOST:PORT with the real port, once started."""

    @property
    def metrics_address(self) -> str | None:
        """HOST:PORT with the real port, once started."""
        return None if self._port is None else self._port.address

    async def start(self) -> None:
        """Listen. OSError for an address that cannot be listened on or a TLS file that cannot be read."""
        self.grpc_address = self._listen(self._config.grpc)
        if self._config.metrics is not None:
            self._open_metrics(self._config.metrics)
        if self._health is not None:
            await self._health.start()
        await self._server.start()

    async def run(self, ready: Callable[[Server], None], leaving: Callable[[], None] = lambda: None) -> None:
        """Start, tell `ready`, serve until SIGTERM or SIGINT, tell `leaving`, drain. SIGINT then ends the process."""
        leave = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, leave.set)
        await self.start()
        ready(self)
        await leave.wait()
        leaving()
        loop.add_signal_handler(signal.SIGINT, os._exit, 130)
        await self.drain()

    async def drain(self, grace_seconds: float | None = None) -> None:
        """NOT_SERVING, refuse what is new, let what runs finish within the grace, end the rest UNAVAILABLE, close."""
        grace = self._config.grace_seconds if grace_seconds is None else grace_seconds
        logger.info("draining: running requests have %g s", grace)
        if self._health is not None:
            await self._health.leave()
        self._guard.refusing = True
        try:
            await asyncio.wait_for(self._engine.drain(grace), grace + 2 * _LAST_WORDS)
        except TimeoutError:
            logger.error("the engine did not end its requests within the grace; closing their calls")
        closing = [] if self._port is None else [asyncio.to_thread(self._port.close)]
        await asyncio.gather(self._server.stop(_LAST_WORDS), *closing)

    def _listen(self, address: str) -> str:
        host = address.rpartition(":")[0]
        try:
            if self._config.tls is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._config.tls.credentials())
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: the address is in use, unknown or not allowed") from error
        return address if address.startswith("unix:") else f"{host}:{port}"

    def _open_metrics(self, address: str) -> None:
        loop = asyncio.get_running_loop()

        async def stats() -> EngineStats:
            return self._engine.stats()

        def snapshot() -> EngineStats:
            return asyncio.run_coroutine_threadsafe(stats(), loop).result(timeout=2.0)

        host, _, port = address.rpartition(":")
        collector = EngineCollector(
            snapshot, self._metrics.engine.adapter_tokens, self._metrics.adapter_labels, self._config.max_loras
        )
        self._metrics.registry.register(collector)
        try:
            self._port = MetricsPort(host.strip("[]"), int(port), self._metrics.registry)
        except OSError as error:
            raise OSError(f"cannot listen on {address} for metrics: {error}") from error


def _health(server: grpc.aio.Server, engine: AsyncEngine) -> Health:
    from peftmux.runtime.server.standard import Health

    return Health(server, engine, [_INFERENCE.full_name, _ADAPTERS.full_name])
