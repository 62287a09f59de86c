"""InferenceService: generation, classification and embedding on the base model and on any loaded adapter."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from functools import partial
from typing import Any, TypeVar, cast

from peftmux.adapters.images import MARKER
from peftmux.runtime.engine.api import AsyncEngine, ClassificationRequest, Delta, EmbeddingRequest, GenerationRequest
from peftmux.runtime.errors import InvalidRequest
from peftmux.runtime.params import Image
from peftmux.runtime.server import images, requests, responses
from peftmux.runtime.server.guard import Write
from peftmux.runtime.server.pace import Pace
from peftmux.v1 import inference_pb2 as pb

T = TypeVar("T")
_LONG_TEXT = 8192
"""Characters from which a text is encoded in a thread, so that other streams do not wait for it."""


class InferenceService:
    """Methods of peftmux.v1.InferenceService over one engine."""

    def __init__(self, engine: AsyncEngine, pace: Pace) -> None:
        self._engine = engine
        self._pace = pace
        self._encoding = 0
        """Long texts in threads now. The tokenizer is theirs, so whoever needs it waits in a thread too."""

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
        async with self._deltas(request, message) as stream:
            return responses.unary_message([delta async for delta in stream])

    async def generate_stream(self, message: pb.GenerateStreamRequest, deadline: float | None, write: Write) -> None:
        request = await self._request(message, deadline, stream=True)
        self._pace.active += 1
        try:
            async with self._deltas(request, message) as stream:
                async for delta in stream:
                    await write(responses.stream_message(delta))
                    if delta.finish_reason is None:
                        await self._pace.wait()
        finally:
            self._pace.active -= 1

    async def tokenize(self, message: pb.TokenizeRequest, deadline: float | None) -> pb.TokenizeResponse:
        ids = await self._encode(message.text)
        pieces = await self._with_tokenizer(len(message.text), partial(self._engine.pieces, ids))
        return pb.TokenizeResponse(token_ids=ids, pieces=pieces)

    async def get_model(self, message: pb.GetModelRequest, deadline: float | None) -> pb.GetModelResponse:
        return responses.model(self._engine.info)

    async def classify(self, message: pb.ClassifyRequest, deadline: float | None) -> pb.ClassifyResponse:
        requests.check_readout(message, self._engine.info)
        prompt = await self._prompt(message)
        requests.check_readout_length(message, prompt, self._engine.info)
        request = ClassificationRequest(prompt, message.adapter, requests.task_of(message), deadline=deadline)
        with _named_input(message):
            return responses.classification(await self._engine.classify(request))

    async def embed(self, message: pb.EmbedRequest, deadline: float | None) -> pb.EmbedResponse:
        requests.check_readout(message, self._engine.info)
        prompt = await self._prompt(message)
        requests.check_readout_length(message, prompt, self._engine.info)
        pooling = requests.POOLINGS[message.pooling]
        task = requests.task_of(message)
        request = EmbeddingRequest(prompt, message.adapter, pooling, message.normalize, task, deadline=deadline)
        with _named_input(message):
            return responses.embedding(await self._engine.embed(request))

    @asynccontextmanager
    async def _deltas(
        self, request: GenerationRequest, message: requests.GenerationMessage
    ) -> AsyncIterator[AsyncIterator[Delta]]:
        """The engine's iterator, closed however the call ends: closing frees the row."""
        deltas = cast("AsyncGenerator[Delta]", self._engine.generate(request))
        with _named_input(message):
            async with aclosing(deltas):
                yield deltas

    async def _request(
        self, message: requests.GenerationMessage, deadline: float | None, *, stream: bool
    ) -> GenerationRequest:
        info = self._engine.info
        sampling, stopping, output = requests.check_generation(message, info)
        prompt, pictures = await self._illustrated(message) if message.images else (await self._prompt(message), ())
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
            task=requests.task_of(message),
            images=pictures,
            adapters=requests.sum_of(message),
        )

    async def _illustrated(self, message: requests.GenerationMessage) -> tuple[tuple[int, ...], tuple[Image, ...]]:
        """The prompt without its images, and these with the places that they or the text's markers name."""
        if images.named_positions(message):
            return await self._prompt(message), images.images_at(message, [i.position for i in message.images])
        pieces: Sequence[Sequence[int]] = [tuple(message.token_ids.ids)]
        if message.WhichOneof("input") == "text":
            pieces = await self._in_thread(partial(self._engine.encode_around, message.text, MARKER))
        elif message.WhichOneof("input") == "chat":
            turns = [(turn.role, turn.content) for turn in message.chat.messages]
            pieces = await self._in_thread(partial(self._engine.encode_around, turns, MARKER))
        prompt, positions = images.marked_positions(pieces, len(message.images))
        return prompt, images.images_at(message, positions)

    async def _prompt(self, message: requests.PromptMessage) -> tuple[int, ...]:
        if message.WhichOneof("input") == "token_ids":
            return tuple(message.token_ids.ids)
        if not isinstance(message, requests.GenerationMessage) or message.WhichOneof("input") == "text":
            return await self._encode(message.text)
        turns = [(turn.role, turn.content) for turn in message.chat.messages]
        size = sum(len(content) for _, content in turns)
        return await self._with_tokenizer(size, partial(self._engine.encode_chat, turns))

    async def _encode(self, text: str) -> tuple[int, ...]:
        return await self._with_tokenizer(len(text), partial(self._engine.encode, text))

    async def _with_tokenizer(self, characters: int, call: Callable[[], T]) -> T:
        """Where it is over at once it is done here: a thread would cost more."""
        if characters >= _LONG_TEXT:
            return await self._in_thread(call)
        return await asyncio.to_thread(call) if self._encoding else call()

    async def _in_thread(self, call: Callable[[], T]) -> T:
        """Counted until it is over, also where its caller has gone."""
        task = asyncio.create_task(asyncio.to_thread(call))
        self._encoding += 1
        task.add_done_callback(self._encoded)
        return await asyncio.shield(task)

    def _encoded(self, task: asyncio.Task[Any]) -> None:
        self._encoding -= 1
        if not task.cancelled():
            task.exception()  # raised to the caller; read here so that asyncio does not complain where it has gone


@contextmanager
def _named_input(message: requests.PromptMessage) -> Iterator[None]:
    """What the engine says of its `input` is about the field that the request has set."""
    try:
        yield
    except InvalidRequest as error:
        if error.field != "input":
            raise
        raise InvalidRequest(message.WhichOneof("input") or "input", str(error)) from None
