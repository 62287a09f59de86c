"""Health, reflection, the drain, and addresses."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from peftmux.runtime.server import Server, ServerConfig, ServerMetrics
from peftmux.runtime.server.pace import Pace
from peftmux.v1 import inference_pb2 as pb
from tests.server.conftest import FakeEngine, Serve, Served, answer_of

SERVICES = ("", "peftmux.v1.InferenceService", "peftmux.v1.AdapterService")
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health(served: Served, service: str = "") -> int:
    stub: Any = health_pb2_grpc.HealthStub(served.channel)
    response = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return int(response.status)


def watch_health(served: Served) -> Any:
    stub: Any = health_pb2_grpc.HealthStub(served.channel)
    return stub.Watch(health_pb2.HealthCheckRequest())


def stream(served: Served, max_tokens: int):
    request = pb.GenerateStreamRequest(text="x", stopping=pb.StoppingParams(max_tokens=max_tokens))
    return served.inference.GenerateStream(request)


async def collect(call) -> list[str]:
    return [message.text async for message in call]


@pytest.mark.parametrize("service", SERVICES)
async def test_health_of_each_service(served: Served, service):
    assert await health(served, service) == SERVING


async def test_health_of_an_unknown_service(served: Served):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health(served, "nobody")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_follows_the_engine(served: Served):
    watch = watch_health(served)
    assert (await watch.read()).status == SERVING
    served.engine.healthy = False
    assert (await asyncio.wait_for(watch.read(), 3)).status == NOT_SERVING
    assert [await health(served, service) for service in SERVICES] == [NOT_SERVING] * 3
    served.engine.healthy = True
    assert (await asyncio.wait_for(watch.read(), 3)).status == SERVING
    watch.cancel()


async def test_an_engine_whose_state_cannot_be_read_is_not_serving(served: Served, monkeypatch):
    def fail(engine: FakeEngine) -> bool:
        raise RuntimeError("gone")

    monkeypatch.setattr(FakeEngine, "healthy", property(fail), raising=False)
    await asyncio.sleep(0.8)
    assert await health(served) == NOT_SERVING


async def test_reflection_lists_the_services_and_gives_the_contract(served: Served):
    channel: Any = served.channel
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    ask = reflection_pb2.ServerReflectionRequest
    requests = [ask(list_services=""), ask(file_containing_symbol="peftmux.v1.InferenceService")]
    answers = [answer async for answer in stub.ServerReflectionInfo(iter(requests))]
    listed = {service.name for service in answers[0].list_services_response.service}
    assert listed == {*SERVICES[1:], "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert answers[1].file_descriptor_response.file_descriptor_proto == [pb.DESCRIPTOR.serialized_pb]


async def test_a_drain_finishes_what_fits_and_ends_the_rest(serve: Serve):
    served = await serve()
    served.engine.seconds_per_token = 0.02
    short, long = stream(served, 10), stream(served, 100)
    whole = asyncio.create_task(collect(short))
    cut = asyncio.create_task(collect(long))
    while served.engine.created < 2:
        await asyncio.sleep(0.005)
    started = time.monotonic()
    drain = asyncio.create_task(served.server.drain(0.5))
    await asyncio.sleep(0.1)
    assert await health(served) == NOT_SERVING
    refused = await answer_of(served.inference.Generate(pb.GenerateRequest(text="x")))
    assert (refused.code, refused.info.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    assert refused.retry.retry_delay.seconds == 1
    assert await whole == [f"<{i}>" for i in range(10)]
    failure = await answer_of(cut)
    assert (failure.code, failure.info.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    await drain
    assert 0.45 < time.monotonic() - started < 0.5 + 2
    assert served.engine.created == served.engine.released == 2


async def test_a_drain_without_requests_is_quick(serve: Serve):
    served = await serve()
    watch = watch_health(served)
    await watch.read()
    started = time.monotonic()
    await served.server.drain(30)
    assert time.monotonic() - started < 1.5
    watch.cancel()


async def test_an_engine_that_does_not_stop_does_not_stop_the_drain(serve: Serve):
    served = await serve()

    async def hang(grace_seconds: float) -> None:
        await asyncio.sleep(60)

    served.engine.drain = hang  # type: ignore[method-assign]
    served.engine.seconds_per_token = 0.01
    cut = asyncio.create_task(collect(stream(served, 100)))
    started = time.monotonic()
    await served.server.drain(0.1)
    assert time.monotonic() - started < 0.1 + 2
    with pytest.raises(grpc.aio.AioRpcError):
        await cut


@pytest.mark.parametrize("which", ["grpc", "metrics"])
async def test_a_taken_port_is_said(served: Served, which):
    taken = served.server.grpc_address
    free = "127.0.0.1:0"
    config = ServerConfig(grpc=taken, metrics=None) if which == "grpc" else ServerConfig(grpc=free, metrics=taken)
    with pytest.raises(OSError, match=f"cannot listen on {taken}"):
        await Server(FakeEngine(), ServerMetrics(), config).start()


async def test_real_ports_are_told(serve: Serve):
    served = await serve(metrics="127.0.0.1:0")
    addresses = (served.server.grpc_address, str(served.server.metrics_address))
    ports = [int(address.rpartition(":")[2]) for address in addresses]
    assert 0 not in ports
    assert len(set(ports)) == 2


async def test_a_unix_socket(serve: Serve, tmp_path):
    served = await serve(grpc=f"unix:{tmp_path}/s")
    assert served.server.grpc_address == f"unix:{tmp_path}/s"
    assert (await served.inference.Generate(pb.GenerateRequest(text="x"))).text == "<0><1><2>"


def test_pace_waits_only_under_load():
    pace = Pace(cost=0.001, free=4, ceiling=0.05)
    intervals = []
    for active in (1, 4, 5, 32, 500):
        pace.active = active
        intervals.append(pace.interval())
    assert intervals == [0.0, 0.0, 0.005, 0.032, 0.05]
