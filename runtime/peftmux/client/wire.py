"""What the two clients share: the channel's settings, the methods, and when to try again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message

from peftmux.client.errors import RpcError
from peftmux.v1 import adapters_pb2, inference_pb2

OPTIONS = [
    ("grpc.max_receive_message_length", -1),  # prompt_logprobs of a long prompt
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
]
_MAX_BACKOFF = 8.0


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files. Without `ca` the system's roots are trusted; `cert` and `key` are this client's own."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """OSError where a file cannot be read."""
        ca, key, cert = (None if path is None else path.read_bytes() for path in (self.ca, self.key, self.cert))
        return grpc.ssl_channel_credentials(ca, key, cert)


@dataclass(frozen=True, slots=True)
class Method:
    """One unary method, or one with a stream of responses."""

    path: str
    parse: Callable[[bytes], Any]

    def on(self, channel: Any, make: str = "unary_unary") -> Any:
        """The multi-callable of a grpc or grpc.aio channel."""
        make_call = getattr(channel, make)
        return make_call(self.path, request_serializer=_serialise, response_deserializer=self.parse)


def _serialise(message: Message) -> bytes:
    return message.SerializeToString()


GENERATE = Method("/peftmux.v1.InferenceService/Generate", inference_pb2.GenerateResponse.FromString)
GENERATE_STREAM = Method("/peftmux.v1.InferenceService/GenerateStream", inference_pb2.GenerateStreamResponse.FromString)
CLASSIFY = Method("/peftmux.v1.InferenceService/Classify", inference_pb2.ClassifyResponse.FromString)
EMBED = Method("/peftmux.v1.InferenceService/Embed", inference_pb2.EmbedResponse.FromString)
TOKENIZE = Method("/peftmux.v1.InferenceService/Tokenize", inference_pb2.TokenizeResponse.FromString)
GET_MODEL = Method("/peftmux.v1.InferenceService/GetModel", inference_pb2.GetModelResponse.FromString)
LOAD_ADAPTER = Method("/peftmux.v1.AdapterService/LoadAdapter", adapters_pb2.LoadAdapterResponse.FromString)
UNLOAD_ADAPTER = Method("/peftmux.v1.AdapterService/UnloadAdapter", adapters_pb2.UnloadAdapterResponse.FromString)
GET_ADAPTER = Method("/peftmux.v1.AdapterService/GetAdapter", adapters_pb2.GetAdapterResponse.FromString)
LIST_ADAPTERS = Method("/peftmux.v1.AdapterService/ListAdapters", adapters_pb2.ListAdaptersResponse.FromString)

UPDATE_ADAPTER = Method("/peftmux.v1.AdapterService/UpdateAdapter", adapters_pb2.UpdateAdapterResponse.FromString)
WATCH_ADAPTERS = Method("/peftmux.v1.AdapterService/WatchAdapters", adapters_pb2.WatchAdaptersResponse.FromString)


def metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    return () if token is None else (("authorization", f"Bearer {token}"),)


class Attempts:
    """The time and the tries of one call.

    A failure is tried again only where the server said when (google.rpc.RetryInfo), after that time doubled with each
    try and spread by a quarter, while tries and the deadline allow.
    """

    def __init__(self, timeout: float | None, retries: int) -> None:
        self._end = None if timeout is None else time.monotonic() + timeout
        self._left = retries
        self._factor = 1.0

    def remaining(self) -> float | None:
        """Seconds for the next try, or None for no limit."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def delay(self, error: RpcError) -> float | None:
        """Seconds to wait before the next try, or None if there is none."""
        if error.retry_after is None or self._left == 0:
            return None
        self._left -= 1
        delay = min(error.retry_after * self._factor, max(_MAX_BACKOFF, error.retry_after)) * random.uniform(1, 1.25)
        self._factor *= 2
        remaining = self.remaining()
        return delay if remaining is None or delay < remaining else None
