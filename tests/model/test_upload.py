"""Adapters on their way to the device, with a stand-in for its streams: tests/gpu has the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftmux.adapters.lower import load_adapter
from peftmux.adapters.parts import LinearPart
from peftmux.kernels.experts import ExpertsPart
from peftmux.kernels.experts.site import PreparedExperts
from peftmux.kernels.mixture.site import PreparedMixture
from peftmux.kernels.tree import tensors
from peftmux.runtime.engine.placement import DevicePlacement, PreparedAdapter, prepare
from peftmux.runtime.model import upload as uploads
from peftmux.runtime.model.experts import PreparedRouter
from peftmux.runtime.model.graphs import CudaCapture
from peftmux.runtime.model.load import load_model
from peftmux.runtime.model.loaded import LoadedModel
from peftmux.runtime.model.runner import Runner
from peftmux.runtime.model.upload import Upload, dense
from peftmux.runtime.scheduler import Scheduler
from tests.engine.harness import FIXTURES, base
from tests.folders import CLASSIFIES, GENERATES

FOLDERS = sorted(name for name in {*GENERATES, *CLASSIFIES} if name.split("/")[1] == "llama")
BLOCKS, BLOCK_SIZE = 64, 4


class Stream:
    """Of CUDA, as far as uploads and captures use it."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.priority = priority
        self.waited: list[Any] = []

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)

    def wait_stream(self, other: Any) -> None:
        self.waited.append(other)


class Block:
    """A context that does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Any]]:
    """What was said to be used on which stream; every tensor passes for one of the device."""
    seen: list[tuple[Tensor, Any]] = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: seen.append((tensor, stream)))
    return seen


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Stream:
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    return stream


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    loaded = load_model(base(), device=torch.device("cpu"), dtype=torch.float32)
    Runner(loaded, BLOCKS, BLOCK_SIZE)
    return loaded


@pytest.fixture(scope="module", params=FOLDERS)
def prepared(request: pytest.FixtureRequest, model: LoadedModel) -> PreparedAdapter:
    return prepare(model, load_adapter(FIXTURES / request.param, model), BLOCK_SIZE)


def memory(found: list[Tensor]) -> int:
    """Bytes of what the tensors lie in."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for whole in found for t in dense(whole)}
    return sum(storages.values())


def test_on_the_cpu_parts_stay_what_they_are():
    part = LinearPart(torch.ones(2, 3), torch.ones(4, 2))
    with Upload(torch.device("cpu")) as upload:
        assert upload.move(part) is part
    upload.wait([])


def test_all_that_an_adapter_holds_is_handed_over(model, prepared):
    found = list(prepared.tensors())
    assert memory(found) >= sum(each.nbytes for _, each in prepared.sites)
    assert all(memory(list(tensors(each))) >= each.nbytes for _, each in prepared.sites)
    held = {id(tensor) for tensor in found}
    assert all(id(t) in held for t in tensors(prepared.stored))
    assert all(id(k) in held and id(v) in held for cache in prepared.caches for k, v in cache.layers)


def test_what_experts_and_routers_hold_is_found():
    one = ExpertsPart(torch.ones(2, 1, 3), torch.ones(2, 4, 1), 1.0)
    mixture = PreparedMixture(torch.ones(2, 3), 1, {"up": PreparedExperts(one)})
    assert {id(t) for t in tensors(mixture)} == {id(mixture.router), id(one.a), id(one.b)}
    router = PreparedRouter(nn.Linear(3, 2), torch.ones(2, 3))
    assert [id(t) for t in tensors(router)] == [id(router.weight)]
    assert router.nbytes == 24


def test_memory_of_an_upload_is_kept_for_the_stream_that_reads_it(model, recorded, current):
    """A prefix's keys are read by the engine's stream after the adapter is let go."""
    adapter = prepare(model, load_adapter(FIXTURES / "peft" / "llama" / "prefix", model), BLOCK_SIZE)
    done: Any = object()
    adapter.upload._done = done
    scheduler = Scheduler(BLOCKS, BLOCK_SIZE, 512, 8, True)
    DevicePlacement(scheduler, Runner(model, BLOCKS, BLOCK_SIZE), None).place("prefix", adapter)
    assert current.waited == [done]
    assert adapter.stored is not None
    assert {id(t) for t, stream in recorded if stream is current} >= {id(t) for t in tensors(adapter.stored)}


def test_compressed_rows_are_recorded_by_their_pieces(recorded, current):
    """Torch refuses the matrix itself."""
    matrix = torch.eye(3).to_sparse_csr()
    upload = Upload(torch.device("cpu"))
    upload._done = object()  # type: ignore[assignment]
    upload.wait([matrix])
    assert [t.layout for t, _ in recorded] == [torch.strided] * 3


def test_parts_made_on_the_device_are_waited_for(monkeypatch, recorded, current):
    own = Stream()
    monkeypatch.setattr(uploads, "_stream", lambda device: own)
    monkeypatch.setattr(torch.cuda, "stream", Block)
    monkeypatch.setattr(torch.cuda, "Event", lambda: type("Event", (), {"record": lambda *_: None})())
    made = torch.ones(2, device="meta")
    with Upload(torch.device("cuda", 0)) as upload:
        assert own.waited == [], "an upload from the host waits for nothing"
        assert upload.move(LinearPart(bias=made)).bias is made
    assert own.waited == [current]
    assert [(id(t), stream) for t, stream in recorded] == [(id(made), own)]


def test_captures_never_share_the_uploads_stream(monkeypatch, current):
    """Torch hands out the streams of one priority in turn: whoever takes a new one each time meets the uploads'."""
    taken: list[Stream] = []

    class Taken(Stream):
        def __init__(self, device: Any = None, priority: int = 0) -> None:
            super().__init__(device, priority)
            taken.append(self)

    used: list[Any] = []

    def graph(*_: Any, stream: Any, **__: Any) -> Block:
        used.append(stream)
        return Block()

    monkeypatch.setattr(torch.cuda, "Stream", Taken)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", Block)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(uploads, "_streams", {})
    capture = CudaCapture()
    for _ in range(40):
        capture(lambda: torch.ones(1))
    theirs = uploads._stream(torch.device("cuda", 0))
    assert len(taken) == 2
    assert set(used) == {taken[0]}
    assert isinstance(theirs, Taken)
    assert theirs.priority != taken[0].priority
