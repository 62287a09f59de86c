"""AdapterService: the life of adapters on this server."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, cast

from peftmux.runtime.engine.api import AdapterInfo, AsyncEngine
from peftmux.runtime.server import responses
from peftmux.runtime.server.guard import Write
from peftmux.runtime.server.requests import Checks, check_name
from peftmux.v1 import adapters_pb2 as pb


class AdapterService:
    """Methods of peftmux.v1.AdapterService over one engine."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def methods(self) -> Mapping[str, Any]:
        return {
            "LoadAdapter": self.load,
            "UnloadAdapter": self.unload,
            "GetAdapter": self.get,
            "ListAdapters": self.list,
            "UpdateAdapter": self.update,
            "WatchAdapters": self.watch,
        }

    async def load(self, message: pb.LoadAdapterRequest, deadline: float | None) -> pb.LoadAdapterResponse:
        checks = Checks()
        check_name(checks, "name", message.name)
        checks.expect(bool(message.source), "source", "a path under the adapter root", "an empty source")
        checks.done()
        info = await self._engine.load_adapter(
            message.name,
            message.source,
            revision=message.revision,
            pinned=message.pinned,
            wait=message.wait,
            replace=message.replace,
        )
        return pb.LoadAdapterResponse(adapter=responses.adapter(info))

    async def unload(self, message: pb.UnloadAdapterRequest, deadline: float | None) -> pb.UnloadAdapterResponse:
        _check_name(message.name)
        info = await self._engine.unload_adapter(message.name, wait=message.wait)
        return pb.UnloadAdapterResponse(adapter=responses.adapter(info))

    async def get(self, message: pb.GetAdapterRequest, deadline: float | None) -> pb.GetAdapterResponse:
        _check_name(message.name)
        return pb.GetAdapterResponse(adapter=responses.adapter(self._engine.get_adapter(message.name)))

    async def list(self, message: pb.ListAdaptersRequest, deadline: float | None) -> pb.ListAdaptersResponse:
        return pb.ListAdaptersResponse(adapters=[responses.adapter(info) for info in self._engine.list_adapters()])

    async def update(self, message: pb.UpdateAdapterRequest, deadline: float | None) -> pb.UpdateAdapterResponse:
        checks = Checks()
        check_name(checks, "name", message.name)
        weight = message.weight if message.HasField("weight") else None
        good = weight is None or 0 < weight < math.inf
        checks.expect(good, "weight", "a positive number", weight)
        checks.done()
        pinned = message.pinned if message.HasField("pinned") else None
        info = await self._engine.update_adapter(message.name, pinned=pinned, weight=weight)
        return pb.UpdateAdapterResponse(adapter=responses.adapter(info))

    async def watch(self, message: pb.WatchAdaptersRequest, deadline: float | None, write: Write) -> None:
        infos = cast("AsyncGenerator[AdapterInfo]", self._engine.watch_adapters())
        async with aclosing(infos):
            async for info in infos:
                await write(pb.WatchAdaptersResponse(adapter=responses.adapter(info)))


def _check_name(name: str) -> None:
    checks = Checks()
    check_name(checks, "name", name)
    checks.done()
