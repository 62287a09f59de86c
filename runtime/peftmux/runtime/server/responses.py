"""The engine's values -> response messages."""

from __future__ import annotations

from collections.abc import Iterable

from peftmux.runtime.engine.api import (
    AdapterInfo,
    AdapterState,
    Classification,
    Delta,
    Embedding,
    ModelInfo,
    ResidencyLevel,
)
from peftmux.runtime.params import FinishReason, TokenLogprob, Usage
from peftmux.v1 import adapters_pb2, inference_pb2

FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: inference_pb2.FINISH_REASON_CANCELLED,
}
STATES = {
    AdapterState.LOADING: adapters_pb2.ADAPTER_STATE_LOADING,
    AdapterState.READY: adapters_pb2.ADAPTER_STATE_READY,
    AdapterState.DRAINING: adapters_pb2.ADAPTER_STATE_DRAINING,
    AdapterState.FAILED: adapters_pb2.ADAPTER_STATE_FAILED,
    AdapterState.UNLOADED: adapters_pb2.ADAPTER_STATE_UNLOADED,
}
RESIDENCIES = {
    None: adapters_pb2.RESIDENCY_UNSPECIFIED,
    ResidencyLevel.DEVICE: adapters_pb2.RESIDENCY_DEVICE,
    ResidencyLevel.HOST: adapters_pb2.RESIDENCY_HOST,
    ResidencyLevel.DISK: adapters_pb2.RESIDENCY_DISK,
}


def stream_message(delta: Delta) -> inference_pb2.GenerateStreamResponse:
    """One delta as one message. The common one, text and tokens alone, takes the short way."""
    message = inference_pb2.GenerateStreamResponse(
        text=delta.text, token_ids=delta.token_ids, adapter_revision=delta.adapter_revision
    )
    if delta.logprobs:
        message.logprobs.extend(logprobs(delta.logprobs))
    if delta.prompt_logprobs:
        message.prompt_logprobs.extend(logprobs(delta.prompt_logprobs))
    if delta.finish_reason is not None:
        message.finish_reason = FINISH_REASONS[delta.finish_reason]
    if delta.usage is not None:
        message.usage.CopyFrom(usage(delta.usage))
    return message


def unary_message(deltas: Iterable[Delta]) -> inference_pb2.GenerateResponse:
    """All deltas of one request as one message."""
    message = inference_pb2.GenerateResponse()
    texts = []
    for delta in deltas:
        texts.append(delta.text)
        message.token_ids.extend(delta.token_ids)
        message.logprobs.extend(logprobs(delta.logprobs))
        message.prompt_logprobs.extend(logprobs(delta.prompt_logprobs))
        if delta.adapter_revision:
            message.adapter_revision = delta.adapter_revision
        if delta.finish_reason is not None:
            message.finish_reason = FINISH_REASONS[delta.finish_reason]
        if delta.usage is not None:
            message.usage.CopyFrom(usage(delta.usage))
    message.text = "".join(texts)
    return message


def classification(value: Classification) -> inference_pb2.ClassifyResponse:
    rows = zip(value.logits, value.probabilities, value.labels, strict=True)
    return inference_pb2.ClassifyResponse(
        rows=[
            inference_pb2.ClassifyRow(logits=logits, probabilities=probabilities, label=label)
            for logits, probabilities, label in rows
        ],
        labels=value.names,
        usage=usage(value.usage),
        adapter_revision=value.adapter_revision,
    )


def embedding(value: Embedding) -> inference_pb2.EmbedResponse:
    return inference_pb2.EmbedResponse(
        embedding=value.values, usage=usage(value.usage), adapter_revision=value.adapter_revision
    )


def logprobs(values: Iterable[TokenLogprob]) -> list[inference_pb2.TokenLogprob]:
    return [
        inference_pb2.TokenLogprob(
            token_id=value.token_id,
            logprob=value.logprob,
            top=[inference_pb2.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in value.top],
        )
        for value in values
    ]


def usage(value: Usage) -> inference_pb2.Usage:
    return inference_pb2.Usage(
        prompt_tokens=value.prompt_tokens,
        completion_tokens=value.completion_tokens,
        cached_tokens=value.cached_tokens,
    )


def adapter(info: AdapterInfo) -> adapters_pb2.Adapter:
    return adapters_pb2.Adapter(
        name=info.name,
        revision=info.revision,
        kind=info.kind,
        state=STATES[info.state],
        residency=RESIDENCIES[info.residency],
        pinned=info.pinned,
        min_rank=info.min_rank,
        max_rank=info.max_rank,
        applied_sites=info.applied_sites,
        tensors=info.tensors,
        parameters=info.parameters,
        bytes=info.bytes,
        error=info.error,
        load_seconds=info.load_seconds,
        requests_in_flight=info.requests_in_flight,
        weight=info.weight,
        source=info.source,
    )


def model(info: ModelInfo) -> inference_pb2.GetModelResponse:
    return inference_pb2.GetModelResponse(
        name=info.name,
        architecture=info.architecture,
        vocabulary_size=info.vocabulary_size,
        context_length=info.context_length,
        dtype=info.dtype,
        device=info.device,
        parameters=info.parameters,
        adapter_kinds=info.adapter_kinds,
        max_batch_tokens=info.max_batch_tokens,
        max_queued_requests=info.max_queued_requests,
    )
