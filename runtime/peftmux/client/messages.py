"""Values <-> messages of peftmux.v1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

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
from peftmux.v1 import adapters_pb2, inference_pb2

SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
)
STOPPING = ("max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos")
OUTPUT = ("logprobs", "prompt_logprobs")
PLAIN = ("adapter", "adapter_task", "priority")

RequestT = TypeVar("RequestT", inference_pb2.GenerateRequest, inference_pb2.GenerateStreamRequest)

_FINISH_REASONS = {
    inference_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    inference_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    inference_pb2.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}
_STATES = {
    adapters_pb2.ADAPTER_STATE_LOADING: AdapterState.LOADING,
    adapters_pb2.ADAPTER_STATE_READY: AdapterState.READY,
    adapters_pb2.ADAPTER_STATE_DRAINING: AdapterState.DRAINING,
    adapters_pb2.ADAPTER_STATE_FAILED: AdapterState.FAILED,
    adapters_pb2.ADAPTER_STATE_UNLOADED: AdapterState.UNLOADED,
}
_POOLINGS = {Pooling.MEAN: inference_pb2.POOLING_MEAN, Pooling.LAST: inference_pb2.POOLING_LAST}
_RESIDENCIES = {
    adapters_pb2.RESIDENCY_DEVICE: Residency.DEVICE,
    adapters_pb2.RESIDENCY_HOST: Residency.HOST,
    adapters_pb2.RESIDENCY_DISK: Residency.DISK,
}


def request(kind: type[RequestT], prompt: Prompt, options: GenerateOptions) -> RequestT:
    """TypeError for an unknown option or another type of prompt; ValueError for a value the field cannot hold."""
    given: Mapping[str, Any] = {name: value for name, value in options.items() if value is not None}
    unknown = given.keys() - {*_all_options()}
    if unknown:
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}; expected one of {', '.join(_all_options())}")
    return kind(
        sampling=inference_pb2.SamplingParams(**_only(given, SAMPLING)),
        stopping=inference_pb2.StoppingParams(**_only(given, STOPPING)),
        output=inference_pb2.OutputOptions(**_only(given, OUTPUT)),
        images=[_image(image) for image in given.get("images", ())],
        adapters=[inference_pb2.WeightedAdapter(adapter=a, weight=weight) for a, weight in given.get("adapters", ())],
        **_only(given, PLAIN),
        **_input(prompt),
    )


def classify_request(prompt: PlainPrompt, adapter: str, task: int | None) -> inference_pb2.ClassifyRequest:
    return inference_pb2.ClassifyRequest(adapter=adapter, adapter_task=task, **_plain_input(prompt))


def embed_request(
    prompt: PlainPrompt, adapter: str, task: int | None, pooling: Pooling | str, normalize: bool
) -> inference_pb2.EmbedRequest:
    """ValueError for a pooling that is none."""
    return inference_pb2.EmbedRequest(
        adapter=adapter,
        adapter_task=task,
        pooling=_POOLINGS[Pooling(pooling)],
        normalize=normalize,
        **_plain_input(prompt),
    )


def _plain_input(prompt: PlainPrompt) -> dict[str, Any]:
    fields = _input(prompt)
    if "chat" in fields:
        raise TypeError("expected a prompt of str or token ids, got a conversation")
    return fields


def _image(image: Image) -> inference_pb2.Image:
    content: dict[str, Any] = {"encoded": image.data}
    if image.rows or image.columns:
        patches = inference_pb2.ImagePatches(rows=image.rows, columns=image.columns, values=image.data)
        content = {"patches": patches}
    return inference_pb2.Image(position=image.position, **content)


def _input(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"text": prompt}
    if prompt and all(isinstance(item, ChatMessage) for item in prompt):
        turns = cast(Sequence[ChatMessage], prompt)
        messages = [inference_pb2.ChatMessage(role=turn.role, content=turn.content) for turn in turns]
        return {"chat": inference_pb2.ChatMessages(messages=messages)}
    if all(isinstance(item, int) for item in prompt):
        return {"token_ids": inference_pb2.TokenIds(ids=cast(Sequence[int], prompt))}
    kinds = ", ".join(sorted({type(item).__name__ for item in prompt}))
    raise TypeError(f"expected a prompt of str, token ids or ChatMessage values, got a sequence of {kinds}")


def _only(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}


def _all_options() -> list[str]:
    return sorted([*SAMPLING, *STOPPING, *OUTPUT, *PLAIN, "adapters", "images", "timeout"])


def generation(message: inference_pb2.GenerateResponse) -> Generation:
    return Generation(
        text=message.text,
        token_ids=tuple(message.token_ids),
        finish_reason=_FINISH_REASONS.get(message.finish_reason),
        usage=_usage(message.usage),
        logprobs=_logprobs(message.logprobs),
        prompt_logprobs=_logprobs(message.prompt_logprobs),
        adapter_revision=message.adapter_revision,
    )


def chunk(message: inference_pb2.GenerateStreamResponse) -> Chunk:
    return Chunk(
        text=message.text,
        token_ids=tuple(message.token_ids),
        finish_reason=_FINISH_REASONS.get(message.finish_reason),
        usage=_usage(message.usage) if message.HasField("usage") else None,
        logprobs=_logprobs(message.logprobs),
        prompt_logprobs=_logprobs(message.prompt_logprobs),
        adapter_revision=message.adapter_revision,
    )


def classification(message: inference_pb2.ClassifyResponse) -> Classification:
    return Classification(
        rows=tuple(ClassRow(tuple(row.logits), tuple(row.probabilities), row.label) for row in message.rows),
        labels=tuple(message.labels),
        usage=_usage(message.usage),
        adapter_revision=message.adapter_revision,
    )


def embedding(message: inference_pb2.EmbedResponse) -> Embedding:
    return Embedding(tuple(message.embedding), _usage(message.usage), message.adapter_revision)


def _usage(message: inference_pb2.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.completion_tokens, message.cached_tokens)


def _logprobs(messages: Iterable[inference_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            message.token_id,
            message.logprob if message.HasField("logprob") else None,
            tuple((top.token_id, top.logprob) for top in message.top),
        )
        for message in messages
    )


def tokens(message: inference_pb2.TokenizeResponse) -> Tokens:
    return Tokens(tuple(message.token_ids), tuple(message.pieces))


def model(message: inference_pb2.GetModelResponse) -> Model:
    return Model(
        name=message.name,
        architecture=message.architecture,
        vocabulary_size=message.vocabulary_size,
        context_length=message.context_length,
        dtype=message.dtype,
        device=message.device,
        parameters=message.parameters,
        adapter_kinds=tuple(message.adapter_kinds),
        max_batch_tokens=message.max_batch_tokens,
        max_queued_requests=message.max_queued_requests,
    )


def adapter(message: adapters_pb2.Adapter) -> Adapter:
    return Adapter(
        name=message.name,
        revision=message.revision,
        kind=message.kind,
        state=_STATES.get(message.state),
        residency=_RESIDENCIES.get(message.residency),
        pinned=message.pinned,
        min_rank=message.min_rank,
        max_rank=message.max_rank,
        applied_sites=message.applied_sites,
        tensors=message.tensors,
        parameters=message.parameters,
        bytes=message.bytes,
        error=message.error,
        load_seconds=message.load_seconds,
        requests_in_flight=message.requests_in_flight,
        weight=message.weight,
        source=message.source,
    )
