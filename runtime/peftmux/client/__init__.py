"""Typed clients of a peftmux server.

    with Client("127.0.0.1:50051") as client:
        client.load_adapter("sql", "sql-lora")
        print(client.generate("SELECT", adapter="sql", temperature=0, max_tokens=16).text)

They need gRPC and protobuf alone, nothing of the engine.
"""

from peftmux.client.aio import AsyncClient
from peftmux.client.errors import (
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    RpcError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from peftmux.client.sync import Client
from peftmux.client.types import (
    Adapter,
    AdapterState,
    ChatMessage,
    Chunk,
    Classification,
    ClassRow,
    Embedding,
    FinishReason,
    GenerateOptions,
    Generation,
    Image,
    Model,
    PlainPrompt,
    Pooling,
    Prompt,
    Residency,
    TokenLogprob,
    Tokens,
    Usage,
)
from peftmux.client.wire import Tls

__all__ = [
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
