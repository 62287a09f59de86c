"""Tokens and TLS: who gets in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from peftmux.runtime.server import TlsFiles, Tokens
from peftmux.runtime.server.errors import Unauthenticated
from peftmux.v1 import adapters_pb2, inference_pb2
from tests.server.conftest import Serve, Served, answer_of

METHODS = [
    (service.full_name, method.name, bool(method.server_streaming))
    for module in (inference_pb2, adapters_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


@pytest.fixture
async def guarded(serve: Serve, tmp_path: Path) -> Served:
    path = tmp_path / "tokens"
    path.write_text("# who may\n\n first-token \nsecond-token\n")
    return await serve(tokens=Tokens.read(path))


@pytest.mark.parametrize(("service", "method", "streaming"), METHODS, ids=lambda value: str(value))
@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic first-token", "first-token", "Bearer "])
async def test_no_method_answers_without_a_token(guarded: Served, service, method, streaming, header):
    make: Any = guarded.channel.unary_stream if streaming else guarded.channel.unary_unary
    metadata = () if header is None else (("authorization", header),)
    call = make(f"/{service}/{method}", request_serializer=bytes)(b"", metadata=metadata)
    failure = await answer_of(call.read() if streaming else call)
    assert failure.code is grpc.StatusCode.UNAUTHENTICATED
    assert (failure.info.reason, failure.info.domain) == ("UNAUTHENTICATED", service)
    assert "first-token" not in failure.message


@pytest.mark.parametrize("header", ["Bearer first-token", "bearer second-token"])
async def test_a_token_lets_in(guarded: Served, header):
    request = inference_pb2.GenerateRequest(text="x")
    response = await guarded.inference.Generate(request, metadata=(("authorization", header),))
    assert response.text == "<0><1><2>"


async def test_only_health_is_open(guarded: Served):
    health: Any = health_pb2_grpc.HealthStub(guarded.channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    channel: Any = guarded.channel
    reflect: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = reflect.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    assert (await answer_of(call.read())).code is grpc.StatusCode.UNAUTHENTICATED


def test_an_empty_token_file_is_refused(tmp_path):
    (tmp_path / "tokens").write_text("# nobody\n")
    with pytest.raises(ValueError, match="at least one token"):
        Tokens.read(tmp_path / "tokens")


def test_the_message_never_repeats_the_token():
    with pytest.raises(Unauthenticated) as caught:
        Tokens(["good"]).check("Bearer guessed")
    assert "guessed" not in str(caught.value)


class Authority:
    """A certificate authority of the test's own, and what it signs, as files."""

    def __init__(self, folder: Path) -> None:
        self._authority = trustme.CA()
        self._folder = folder
        self.path = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(self.path)

    def issue(self, name: str) -> tuple[Path, Path]:
        """(certificate, key) for localhost."""
        certificate, key = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        issued = self._authority.issue_cert("localhost")
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        return certificate, key


async def ask(served: Served, credentials: grpc.ChannelCredentials | None) -> str:
    port = served.server.grpc_address.rpartition(":")[2]
    target = f"localhost:{port}"
    options = (("grpc.ssl_target_name_override", "localhost"),)
    channel = (
        grpc.aio.insecure_channel(target)
        if credentials is None
        else grpc.aio.secure_channel(target, credentials, options=options)
    )
    async with channel:
        stub = Served(served.server, served.engine, channel).inference
        response = await stub.Generate(inference_pb2.GenerateRequest(text="x"), timeout=5)
        return str(response.text)


async def test_tls(serve: Serve, tmp_path):
    authority = Authority(tmp_path)
    served = await serve(tls=TlsFiles(*authority.issue("server")))
    assert await ask(served, grpc.ssl_channel_credentials(authority.path.read_bytes())) == "<0><1><2>"
    for wrong in (None, grpc.ssl_channel_credentials()):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(served, wrong)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_mutual_tls(serve: Serve, tmp_path):
    authority = Authority(tmp_path)
    served = await serve(tls=TlsFiles(*authority.issue("server"), client_ca=authority.path))
    ca = authority.path.read_bytes()
    certificate, key = authority.issue("client")
    good = grpc.ssl_channel_credentials(ca, key.read_bytes(), certificate.read_bytes())
    assert await ask(served, good) == "<0><1><2>"
    with pytest.raises(grpc.aio.AioRpcError):
        await ask(served, grpc.ssl_channel_credentials(ca))
