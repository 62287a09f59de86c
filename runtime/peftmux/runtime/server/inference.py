"""InferenceService: generation on the base model and on any loaded adapter."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, cast

from peftmux.runtime.engine.api import AsyncEngine, Delta, GenerationRequest
from peftmux.runtime.server import requests, responses
from peftmux.runtime.server.errors import InvalidFields, NotOffered
from peftmux.runtime.server.guard import Write
from peftmux.runtime.server.pace import Pace
from peftmux.v1 import inference_pb2 as pb

_LONG_TEXT = 8192
"""Characters from which a text is encoded in a thread, so that other streams do not wait for it."""


class InferenceService:
    """Methods of peftmux.v1.InferenceService over one engine."""

    def __init__(self, engine: AsyncEngine, pace: Pace) -> None:
        self._engine = engine
        self._pace = pace

    def methods(self) -> Mapping[str, Any]:
        return {
            "Generate": self.generate,
            "GenerateStream": self.generate_stream,
            "Classify": self.classify,
            "Embed": self.embed,
            "Tokenize": self.tokenize,
            "GetModel": self.get_model,
        }

    async def generate(self, message: pb.GenerateRequest, deadline: float | None) -> pb.GenerateResponse:
        request = await self._request(message, deadline, stream=False)
        async with self._deltas(request) as stream:
            return responses.unary_message([delta async for delta in stream])

    async def generate_stream(self, message: pb.GenerateStreamRequest, deadline: float | None, write: Write) -> None:
        request = await self._request(message, deadline, stream=True)
        async with self._deltas(request) as stream:
            async for delta in stream:
                await write(responses.stream_message(delta))
                if delta.finish_reason is None:
                    await self._pace.wait()

    async def tokenize(self, message: pb.TokenizeRequest, deadline: float | None) -> pb.TokenizeResponse:
        ids = await self._encode(message.text)
        return pb.TokenizeResponse(token_ids=ids, pieces=self._engine.pieces(ids))

    async def get_model(self, message: pb.GetModelRequest, deadline: float | None) -> pb.GetModelResponse:
        return responses.model(self._engine.info)

    async def classify(self, message: pb.ClassifyRequest, deadline: float | None) -> pb.ClassifyResponse:
        raise NotOffered("Classify is not offered by this server: it serves no adapter with a classification head")

    async def embed(self, message: pb.EmbedRequest, deadline: float | None) -> pb.EmbedResponse:
        raise NotOffered("Embed is not offered by this server")

    @asynccontextmanager
    async def _deltas(self, request: GenerationRequest) -> AsyncIterator[AsyncIterator[Delta]]:
        """The engine's iterator, counted while it runs and closed however the call ends: closing frees the row."""
        deltas = cast("AsyncGenerator[Delta]", self._engine.generate(request))
        self._pace.active += 1
        try:
            async with aclosing(deltas):
                yield deltas
        finally:
            self._pace.active -= 1

    async def _request(
        self, message: requests.GenerationMessage, deadline: float | None, *, stream: bool
    ) -> GenerationRequest:
        info = self._engine.info
        sampling, stopping, output = requests.check_generation(message, info)
        self._check_task(message)
        prompt = await self._prompt(message)
        requests.check_lengths(message, prompt, info)
        return GenerationRequest(
            prompt=prompt,
            adapter=message.adapter,
            sampling=sampling,
            stopping=stopping,
            output=output,
            priority=message.priority,
            deadline=deadline,
            stream=stream,
        )

    def _check_task(self, message: requests.GenerationMessage) -> None:
        """No kind of adapter that is served now has tasks."""
        if message.HasField("adapter_task"):
            kind = self._engine.get_adapter(message.adapter.partition("@")[0]).kind
            expected = f"expected unset for {message.adapter!r}, a {kind or 'loading'} adapter without tasks"
            raise InvalidFields((("adapter_task", f"{expected}, got {message.adapter_task}"),))

    async def _prompt(self, message: requests.GenerationMessage) -> tuple[int, ...]:
        kind = message.WhichOneof("input")
        if kind == "token_ids":
            return tuple(message.token_ids.ids)
        if kind == "text":
            return await self._encode(message.text)
        turns = [(turn.role, turn.content) for turn in message.chat.messages]
        if sum(len(content) for _, content in turns) < _LONG_TEXT:
            return self._engine.encode_chat(turns)
        return await asyncio.to_thread(self._engine.encode_chat, turns)

    async def _encode(self, text: str) -> tuple[int, ...]:
        if len(text) < _LONG_TEXT:
            return self._engine.encode(text)
        return await asyncio.to_thread(self._engine.encode, text)
