"""The services that every gRPC tool expects: health and reflection."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from peftmux.runtime.engine.api import AsyncEngine

logger = logging.getLogger(__name__)

_PERIOD = 0.5
"""Seconds between two looks at the engine."""


class Health:
    """grpc.health.v1 for "" and each service: SERVING while the engine is healthy and until `leave`."""

    def __init__(self, server: grpc.aio.Server, engine: AsyncEngine, services: Sequence[str]) -> None:
        self._engine = engine
        self._names = ["", *services]
        self._servicer = health.aio.HealthServicer()
        self._watcher: asyncio.Task[None] | None = None
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], server)

    async def start(self) -> None:
        healthy = self._engine_is_healthy()
        await self._set(healthy)
        self._watcher = asyncio.create_task(self._watch(healthy))

    async def leave(self) -> None:
        """NOT_SERVING from now on, whatever the engine says: the drain begins."""
        if self._watcher is not None:
            self._watcher.cancel()
        await self._servicer.enter_graceful_shutdown()

    async def _watch(self, healthy: bool) -> None:
        while True:
            await asyncio.sleep(_PERIOD)
            before, healthy = healthy, self._engine_is_healthy()
            if healthy != before:
                logger.warning("the engine is %s", "healthy again" if healthy else "not healthy: NOT_SERVING")
                await self._set(healthy)

    def _engine_is_healthy(self) -> bool:
        try:
            return self._engine.healthy
        except Exception:
            logger.exception("the engine's state cannot be read")
            return False

    async def _set(self, healthy: bool) -> None:
        serving = health_pb2.HealthCheckResponse
        for name in self._names:
            await self._servicer.set(name, serving.SERVING if healthy else serving.NOT_SERVING)
