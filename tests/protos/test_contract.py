"""The generated code is what the .proto files give, and the contract's names and numbers do not move."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf.message import Message

from peftmux.v1 import adapters_pb2, inference_pb2

PROTOS = Path(__file__).resolve().parents[2] / "protos"


def _load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("protos_generate", PROTOS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_code_is_up_to_date() -> None:
    generator = _load_generator()
    if generator.installed_generator() != generator.GENERATOR:
        pytest.skip(f"needs grpcio-tools=={generator.GENERATOR}: `make lint-protos` makes this check where it is")
    assert generator.outdated() == []


def test_every_source_is_generated() -> None:
    assert _load_generator().SOURCES == ["peftmux/v1/adapters.proto", "peftmux/v1/inference.proto"]


def test_generated_code_asks_for_no_more_than_the_project_does() -> None:
    project = (PROTOS.parent / "pyproject.toml").read_text()
    assert '"protobuf>=6.31' in project
    assert '"grpcio>=1.74' in project
    assert _load_generator().GENERATOR == "1.74.0"
    for name in ("adapters", "inference"):
        assert "# Protobuf Python Version: 6.31." in (PROTOS / f"peftmux/v1/{name}_pb2.py").read_text()
        assert "GRPC_GENERATED_VERSION = '1.74.0'" in (PROTOS / f"peftmux/v1/{name}_pb2_grpc.py").read_text()


def _shape(message: type[Message]) -> list[tuple[str, int, int, bool]]:
    return [(f.name, f.number, f.type, f.has_presence) for f in message.DESCRIPTOR.fields]


def test_services_are_the_contract() -> None:
    inference = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
    adapters = adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"]
    assert inference.full_name == "peftmux.v1.InferenceService"
    assert [m.name for m in inference.methods] == [
        "Generate",
        "GenerateStream",
        "Classify",
        "Embed",
        "Tokenize",
        "GetModel",
    ]
    assert [m.name for m in adapters.methods] == [
        "LoadAdapter",
        "UnloadAdapter",
        "GetAdapter",
        "ListAdapters",
        "UpdateAdapter",
        "WatchAdapters",
    ]


def test_the_stream_request_has_the_unary_requests_fields() -> None:
    assert _shape(inference_pb2.GenerateRequest) == _shape(inference_pb2.GenerateStreamRequest)
    assert _shape(inference_pb2.GenerateResponse) == _shape(inference_pb2.GenerateStreamResponse)


@pytest.mark.parametrize(
    ("module", "digest"),
    [
        (adapters_pb2, "d5014c285e410277"),
        (inference_pb2, "c9aaad692efd885a"),
    ],
)
def test_the_contract_does_not_move(module: ModuleType, digest: str) -> None:
    """New fields change this digest on purpose: check by eye that nothing else moved, then update it."""
    serialised = module.DESCRIPTOR.serialized_pb
    assert hashlib.sha256(serialised).hexdigest()[:16] == digest
