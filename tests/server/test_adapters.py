"""AdapterService over a real port."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import pytest

from peftmux.adapters import errors as adapters
from peftmux.runtime import errors as runtime
from peftmux.runtime.engine.api import AdapterState, ResidencyLevel
from peftmux.runtime.server import responses
from peftmux.v1 import adapters_pb2 as pb
from tests.server.conftest import Served, adapter_info, answer_of

CODE = grpc.StatusCode


async def test_load_passes_every_field(served: Served):
    message = pb.LoadAdapterRequest(name="a", source="x/y", revision="r", pinned=True, wait=True, replace=True)
    adapter = (await served.adapters.LoadAdapter(message)).adapter
    assert served.engine.loads == [("a", "x/y", {"revision": "r", "pinned": True, "wait": True, "replace": True})]
    assert (adapter.name, adapter.source, adapter.pinned) == ("a", "x/y", True)
    await served.adapters.LoadAdapter(pb.LoadAdapterRequest(name="b", source="z"))
    assert served.engine.loads[1][2] == {"revision": "", "pinned": False, "wait": False, "replace": False}


async def test_get_shows_every_field(served: Served):
    fields = {
        "kind": "dora",
        "residency": ResidencyLevel.HOST,
        "min_rank": 2,
        "max_rank": 8,
        "applied_sites": 14,
        "tensors": 42,
        "parameters": 2**40,
        "bytes": 2**41,
        "error": "e",
        "load_seconds": 1.5,
        "requests_in_flight": 3,
        "weight": 2.0,
        "source": "s",
    }
    served.engine.adapters["a"] = adapter_info("a", **fields)
    shown = (await served.adapters.GetAdapter(pb.GetAdapterRequest(name="a"))).adapter
    assert (shown.state, shown.residency) == (pb.ADAPTER_STATE_READY, pb.RESIDENCY_HOST)
    for field in fields.keys() - {"residency"}:
        assert getattr(shown, field) == fields[field]


async def test_list_and_unload(served: Served):
    assert list((await served.adapters.ListAdapters(pb.ListAdaptersRequest())).adapters) == []
    served.engine.adapters.update({name: adapter_info(name) for name in ("a", "b")})
    listed = (await served.adapters.ListAdapters(pb.ListAdaptersRequest())).adapters
    assert [adapter.name for adapter in listed] == ["a", "b"]
    gone = (await served.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="a", wait=True))).adapter
    assert (gone.state, gone.residency) == (pb.ADAPTER_STATE_UNLOADED, pb.RESIDENCY_UNSPECIFIED)
    failure = await answer_of(served.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="a")))
    assert (failure.code, failure.info.reason) == (CODE.NOT_FOUND, "ADAPTER_NOT_FOUND")
    assert failure.info.domain == "peftmux.v1.AdapterService"


@pytest.mark.parametrize("name", ["", "../x", "a,b", "a" * 129])
async def test_a_bad_name_is_the_callers_error(served: Served, name):
    for call in (
        served.adapters.LoadAdapter(pb.LoadAdapterRequest(name=name, source="x")),
        served.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name=name)),
        served.adapters.GetAdapter(pb.GetAdapterRequest(name=name)),
    ):
        failure = await answer_of(call)
        assert failure.code is CODE.INVALID_ARGUMENT
        assert list(failure.fields) == ["name"]


async def test_an_empty_source_is_the_callers_error(served: Served):
    failure = await answer_of(served.adapters.LoadAdapter(pb.LoadAdapterRequest(name="a")))
    assert list(failure.fields) == ["source"]


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (adapters.SourceNotFound("no such"), CODE.NOT_FOUND, "SOURCE_NOT_FOUND"),
        (adapters.SourceForbidden("outside"), CODE.INVALID_ARGUMENT, "SOURCE_FORBIDDEN"),
        (adapters.AdapterInvalid("PICKLE", "expected safetensors"), CODE.FAILED_PRECONDITION, "PICKLE"),
        (runtime.AdapterExists("other content"), CODE.ALREADY_EXISTS, "ADAPTER_EXISTS"),
        (runtime.AdapterMemoryExhausted("pins"), CODE.RESOURCE_EXHAUSTED, "ADAPTER_MEMORY_EXHAUSTED"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
async def test_load_errors_arrive(served: Served, error, code, reason):
    served.engine.error = error
    failure = await answer_of(served.adapters.LoadAdapter(pb.LoadAdapterRequest(name="a", source="x")))
    assert (failure.code, failure.info.reason, failure.message) == (code, reason, str(error))
    assert failure.fields == ({"source": "outside"} if reason == "SOURCE_FORBIDDEN" else {})


async def test_update_changes_what_is_set(served: Served):
    served.engine.adapters["a"] = adapter_info("a")
    first = await served.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="a", pinned=True))
    assert (first.adapter.pinned, first.adapter.weight) == (True, 1.0)
    second = await served.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="a", weight=2.5))
    assert (second.adapter.pinned, second.adapter.weight) == (True, 2.5)
    third = await served.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="a", pinned=False))
    assert (third.adapter.pinned, third.adapter.weight) == (False, 2.5)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
async def test_a_share_is_a_positive_number(served: Served, weight):
    failure = await answer_of(served.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="../a", weight=weight)))
    assert failure.code is CODE.INVALID_ARGUMENT
    assert failure.fields.keys() == {"name", "weight"}


async def test_an_update_of_nobody_is_not_found(served: Served):
    failure = await answer_of(served.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="a", pinned=True)))
    assert failure.code is CODE.NOT_FOUND


async def test_watch_sends_what_there_is_then_each_change(served: Served):
    served.engine.adapters["a"] = adapter_info("a")
    call = served.adapters.WatchAdapters(pb.WatchAdaptersRequest())
    assert (await call.read()).adapter.name == "a"
    served.engine.changes.put_nowait(replace(adapter_info("b"), state=AdapterState.LOADING))
    change = (await call.read()).adapter
    assert (change.name, change.state) == ("b", pb.ADAPTER_STATE_LOADING)
    call.cancel()
    for _ in range(200):
        if served.engine.released:
            break
        await asyncio.sleep(0.01)
    assert (served.engine.created, served.engine.released) == (1, 1)


def test_every_state_and_level_has_a_number():
    assert responses.STATES.keys() == set(AdapterState)
    assert responses.RESIDENCIES.keys() == {None, *ResidencyLevel}
    assert len(set(responses.STATES.values())) == len(AdapterState)
    assert set(responses.STATES.values()) == set(pb.AdapterState.values()) - {0}
    assert set(responses.RESIDENCIES.values()) == set(pb.Residency.values())
