"""The client's exported names are frozen, and it carries nothing of the engine."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import peftmux.client
from peftmux.client import AsyncClient, Client
from peftmux.client.messages import OUTPUT, PLAIN, SAMPLING, STOPPING
from peftmux.client.types import GenerateOptions
from peftmux.v1 import inference_pb2


def test_exported_names_are_frozen():
    assert peftmux.client.__all__ == [
        "Adapter",
        "AdapterState",
        "AlreadyExists",
        "AsyncClient",
        "Cancelled",
        "ChatMessage",
        "Chunk",
        "ClassRow",
        "Classification",
        "Client",
        "DeadlineExceeded",
        "Embedding",
        "FailedPrecondition",
        "FinishReason",
        "GenerateOptions",
        "Generation",
        "Image",
        "Internal",
        "InvalidArgument",
        "Model",
        "NotFound",
        "PermissionDenied",
        "PlainPrompt",
        "Pooling",
        "Prompt",
        "Residency",
        "ResourceExhausted",
        "RpcError",
        "Tls",
        "TokenLogprob",
        "Tokens",
        "Unauthenticated",
        "Unavailable",
        "Unimplemented",
        "Usage",
    ]


def test_both_clients_have_the_same_methods():
    def surface(client: type) -> dict[str, list[str]]:
        methods = {name: value for name, value in vars(client).items() if not name.startswith("_")}
        return {name: list(inspect.signature(value).parameters) for name, value in methods.items()}

    assert surface(Client) == surface(AsyncClient)
    assert set(surface(Client)) == {
        "classify",
        "close",
        "embed",
        "generate",
        "get_adapter",
        "list_adapters",
        "load_adapter",
        "model",
        "stream",
        "tokenize",
        "unload_adapter",
        "update_adapter",
        "watch_adapters",
        "wait_ready",
    }
    assert list(inspect.signature(Client).parameters) == list(inspect.signature(AsyncClient).parameters)


def test_options_are_the_contracts_fields():
    request = inference_pb2.GenerateRequest.DESCRIPTOR.fields_by_name
    groups = {"sampling": SAMPLING, "stopping": STOPPING, "output": OUTPUT}
    messages: tuple[Any, ...] = (
        inference_pb2.SamplingParams,
        inference_pb2.StoppingParams,
        inference_pb2.OutputOptions,
    )
    for names, message in zip(groups.values(), messages, strict=True):
        assert set(names) == set(message.DESCRIPTOR.fields_by_name)
    repeated = {"adapters", "images"}
    assert set(GenerateOptions.__annotations__) == {*SAMPLING, *STOPPING, *OUTPUT, *PLAIN, *repeated, "timeout"}
    assert set(request) == {*groups, *PLAIN, *repeated, "text", "token_ids", "chat"}


def test_importing_the_client_brings_no_torch():
    code = "import sys, peftmux.client; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
